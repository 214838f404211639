"""The reward function of a training run: grades responses and may revise a whole step's rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vold.config.schema import RewardConfig
from vold.grading import Grader, reward
from vold.run.job import Job
from vold.types import Group, Rollout, Verdict


@dataclass(frozen=True)
class StepGroups:
    """The groups that a step trains on, in the order of their prompts, the same on every rank; and metrics of all the
    groups that were sampled for the step, those it does not train on included."""

    groups: list[Group]
    metrics: dict[str, float]


class RewardFunction(Protocol):
    """Rewards of responses."""

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """Verdicts on (response, gold answer, truncated) in order, called once a group as it finishes."""
        ...

    def assign_rewards(self, step: int, step_groups: StepGroups) -> StepGroups:
        """The groups of 0-based `step` with the rewards they are trained on, once all groups are known. All ranks
        call."""
        ...


class GraderReward:
    """The grader's verdict on the answer, and nothing else."""

    def __init__(self, job: Job, grader: Grader):
        self.grade = grader.grade

    def assign_rewards(self, step: int, step_groups: StepGroups) -> StepGroups:
        """The groups as they were graded."""
        return step_groups


def grade_group(rollouts: Sequence[Rollout], reward_function: RewardFunction, config: RewardConfig) -> Group:
    """Siblings with their verdicts and rewards."""
    verdicts = reward_function.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    rewards = tuple(reward(rollout, verdict, config) for rollout, verdict in zip(rollouts, verdicts, strict=True))
    return Group(rollouts[0].prompt, tuple(rollouts), tuple(verdicts), rewards)
