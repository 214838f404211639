"""Prompts -> rollouts -> graded groups, and what a step shows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vold.config.schema import RewardConfig, RolloutConfig
from vold.grading import Grader, reward
from vold.records import Group, Prompt, Rollout, Sample, Verdict
from vold.stages.evaluate import answer_row


def rollout_calls(prompts: Sequence[Prompt], config: RolloutConfig, ranks: int) -> list[tuple[int, list[Prompt]]]:
    """A step's prompts in numbered portions, one `sample` call each: of at most `sequences_per_call` responses, and as
    many that no rank is idle. A call's seed comes from its number: what is drawn does not depend on who draws it."""
    each = max(1, min(config.sequences_per_call // config.responses_per_prompt, -(-len(prompts) // ranks)))
    return [(first // each, list(prompts[first : first + each])) for first in range(0, len(prompts), each)]


def grade_groups(rollouts: Sequence[Rollout], grader: Grader, responses: int, config: RewardConfig) -> list[Group]:
    """Siblings are adjacent."""
    verdicts = grader.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    return [
        _group(rollouts[first : first + responses], verdicts[first : first + responses], config)
        for first in range(0, len(rollouts), responses)
    ]


def _group(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], config: RewardConfig) -> Group:
    rewards = tuple(reward(rollout, verdict, config) for rollout, verdict in zip(rollouts, verdicts, strict=True))
    return Group(rollouts[0].prompt, tuple(rollouts), tuple(verdicts), rewards)


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length and shares of a step's groups."""
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


def teacher_saving(samples: Sequence[Sample], length: Callable[[Prompt], int]) -> dict[str, float]:
    """`teacher_saved`: share of a step's tokens, prompts included, that the teacher does not read because their KL
    weight is 0. `length`: of a prompt, images included (see Encoder)."""
    lengths = [length(sample.prompt) + len(sample.response_ids) for sample in samples]
    read = sum(tokens for tokens, sample in zip(lengths, samples, strict=True) if sample.kl_weight)
    return {"teacher_saved": 1.0 - read / max(sum(lengths), 1)}


def teacher_blind(weighed: Sequence[Sample], admitted: Sequence[Sample]) -> dict[str, float]:
    """`teacher_blind`: responses that lost their KL term because the teacher does not see their images."""
    return {"teacher_blind": float(sum(a.kl_weight != b.kl_weight for a, b in zip(weighed, admitted, strict=True)))}


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
