"""The reward function of a training run: grades responses and may revise a whole step's rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from vold.config.schema import RewardConfig
from vold.grading import Grader, Item, grade_answers
from vold.grading.reward import answer_values, weighted_sum
from vold.run.job import Job
from vold.train.reward_terms import RewardTerms
from vold.types import Group, Rollout, Verdict


@dataclass(frozen=True)
class StepGroups:
    """The groups that a step trains on, in the order of their prompts, the same on every rank; and metrics of all the
    groups that were sampled for the step, those it does not train on included."""

    groups: list[Group]
    metrics: dict[str, float]


class RewardFunction(Protocol):
    """Rewards of responses."""

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts on items in order, called once a group as it finishes."""
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


@dataclass(frozen=True)
class PendingGroup:
    """Siblings that are graded, but for a judge that may still have to answer.

    values: of each response, the terms of its reward by name; None where a term failed.
    feedback: what reward functions say of each response; empty where there are none.
    """

    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]
    values: Sequence[Mapping[str, float | None]]
    judged: Sequence[Future]
    terms: RewardTerms | None = None
    feedback: Sequence[str | None] = ()

    @property
    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return all(future.done() for future in self.judged)

    def finish(self, config: RewardConfig, routed_by: str | None) -> Group:
        """The group with its rewards. A response without a term that is weighted, or that routing reads, has none."""
        values = self.values
        if self.judged:
            assert self.terms is not None
            answers = map(self.terms.judge_values, self.rollouts, self.judged)
            values = [{**known, **judged} for known, judged in zip(values, answers, strict=True)]
        rewards = [
            weighted_sum(of_response, config.weights)
            if routed_by is None or of_response.get(routed_by) is not None
            else None
            for of_response in values
        ]
        return Group(
            self.rollouts[0].prompt,
            tuple(self.rollouts),
            tuple(self.verdicts),
            tuple(rewards),
            values=tuple(values),
            feedback=tuple(self.feedback),
        )


def start_grading(
    rollouts: Sequence[Rollout], reward_function: RewardFunction, terms: RewardTerms | None
) -> PendingGroup:
    """Grade siblings and call the reward functions; the judge's requests are under way when this returns."""
    judged = terms.ask_judge(rollouts) if terms else []
    verdicts = grade_answers(reward_function.grade, rollouts)
    values = [answer_values(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
    feedback: list[str | None] = []
    if terms:
        own = terms.function_values(rollouts)
        values = [answer | functions for answer, (functions, _) in zip(values, own, strict=True)]
        feedback = [words for _, words in own]
    return PendingGroup(rollouts, verdicts, values, judged, terms, feedback)


def grade_group(rollouts: Sequence[Rollout], reward_function: RewardFunction, config: RewardConfig) -> Group:
    """Siblings with their verdicts and rewards, which are of the answer and its form alone."""
    return start_grading(rollouts, reward_function, None).finish(config, None)
