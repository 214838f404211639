"""Rollouts -> graded groups, and what a step shows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vold.grading import Grader
from vold.records import Group, Rollout, Sample, Verdict
from vold.stages.evaluate import answer_row


def grade_groups(rollouts: Sequence[Rollout], grader: Grader, responses: int) -> list[Group]:
    """Siblings are adjacent. A truncated response scores 0; one the grader broke on has no reward."""
    verdicts = grader.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    return [
        _group(rollouts[first : first + responses], verdicts[first : first + responses])
        for first in range(0, len(rollouts), responses)
    ]


def _group(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> Group:
    rewards = tuple(None if v.outcome == "broken" else float(v.outcome == "correct") for v in verdicts)
    return Group(rollouts[0].prompt, tuple(rollouts), tuple(verdicts), rewards)


def group_metrics(groups: Sequence[Group], sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
    """Reward, length and shares over all ranks."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    solved = [set(group.rewards) == {1.0} for group in groups]
    failed = [set(group.rewards) == {0.0} for group in groups]
    tokens = sum_over_ranks(float(sum(len(rollout.response_ids) for rollout in rollouts)))
    responses, graded, prompts = (sum_over_ranks(float(len(x))) for x in (rollouts, rewards, groups))
    return {
        "reward": sum_over_ranks(sum(rewards)) / max(graded, 1.0),
        "response_tokens": tokens,
        "response_length": tokens / max(responses, 1.0),
        "truncated": sum_over_ranks(float(sum(r.finish_reason == "length" for r in rollouts))) / max(responses, 1.0),
        "broken": responses - graded,
        "groups_solved": sum_over_ranks(float(sum(solved))) / max(prompts, 1.0),
        "groups_failed": sum_over_ranks(float(sum(failed))) / max(prompts, 1.0),
    }


def group_rows(groups: Sequence[Group], samples: Sequence[Sample], mean_kl: dict[int, float], limit: int) -> list[dict]:
    """Rows for samples.jsonl: up to `limit` graded responses, spread over the groups."""
    graded = [
        (rollout, verdict)
        for group in groups
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
        if verdict.outcome != "broken"
    ]
    stride = max(len(graded) // max(limit, 1), 1)
    return [
        answer_row(*graded[place]) | {"advantage": samples[place].advantage, "mean_kl": mean_kl.get(place)}
        for place in range(0, len(graded), stride)[:limit]
    ]
