"""Metrics of a step's groups: rewards, lengths, speed and staleness of the rollouts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from vold.io import log
from vold.train.reward_function import StepGroups
from vold.train.rollout_worker import RankRollouts
from vold.types import Group


def is_mixed(group: Group) -> bool:
    """Whether some, and not all, of the graded responses are right."""
    right = [
        v.outcome == "correct" for v, reward in zip(group.verdicts, group.rewards, strict=True) if reward is not None
    ]
    return any(right) and not all(right)


def pass_rate(group: Group | None) -> float | None:
    """Share of correct answers; None for a group that was lost, or where the grader broke on every response."""
    graded = [verdict.outcome for verdict in group.verdicts if verdict.outcome != "broken"] if group else []
    return graded.count("correct") / len(graded) if graded else None


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward and length, token count, and shares of truncated responses, solved and failed groups."""
    if not groups:
        return {"response_tokens": 0.0}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    outcomes = [{verdict.outcome for verdict in group.verdicts} for group in groups]
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return {
        "reward": sum(rewards) / max(len(rewards), 1),
        "response_tokens": float(tokens),
        "response_length": tokens / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "broken": float(len(rollouts) - len(rewards)),
        "groups_solved": outcomes.count({"correct"}) / len(groups),
        "groups_failed": outcomes.count({"wrong"}) / len(groups),
    }


def speed_metrics(batches: Sequence[Sequence[RankRollouts]], groups: Sequence[Group]) -> dict[str, float]:
    """Speed of a step's prompt batches, one after the other, each as fast as its slowest rank (`batches`: the rollouts
    of every rank). The tail is the time from the median group to the last."""
    seconds = sum(max(rank.seconds for rank in ranks) for ranks in batches)
    finish_seconds = [[second for rank in ranks for second in rank.finish_seconds] for ranks in batches]
    tail = sum(max(finished) - statistics.median(finished) for finished in finish_seconds if finished)
    tokens = sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
    return {"rollout_tail_seconds": tail, "rollout_tokens_per_second": tokens / max(seconds, 1e-9)}


def staleness_metrics(groups: Sequence[Group], updates: int) -> dict[str, float]:
    """Updates between the weights that sampled a response and those of now; mean and maximum over responses, each of
    which has the mean, or the maximum, of its tokens. Where weights changed while responses were sampled also
    `responses_continued`, the share of those responses.

    updates: completed since the first weight sync of this process. That sync is version 1, and one follows each update.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    mixed = [rollout.versions for rollout in rollouts if rollout.versions is not None]
    means = [float(rollout.version if rollout.versions is None else rollout.versions.mean()) for rollout in rollouts]
    metrics = {
        "staleness_mean": updates + 1 - statistics.fmean(means),
        "staleness_max": float(updates + 1 - min(rollout.version for rollout in rollouts)),
    }
    return metrics | ({"responses_continued": len(mixed) / len(rollouts)} if mixed else {})


def mask_non_finite(step_groups: StepGroups) -> StepGroups:
    """The groups with rewards that are NaN or infinite masked, and counted as `rewards_not_finite` where there are
    any."""
    broken = [[r is not None and not math.isfinite(r) for r in group.rewards] for group in step_groups.groups]
    count = sum(map(sum, broken))
    if not count:
        return step_groups
    log.warning(f"{count} rewards are NaN or infinite; their responses are masked")
    groups = [
        replace(group, rewards=tuple(None if bad else r for bad, r in zip(flags, group.rewards, strict=True)))
        for group, flags in zip(step_groups.groups, broken, strict=True)
    ]
    metrics = step_groups.metrics | group_metrics(groups) | {"rewards_not_finite": float(count)}
    return StepGroups(groups, metrics)
