"""The challenger's reward: its questions are answered by the solver, and compared with each other and with the memory
bank (R-Zero, R-Diverse).

Shape letters: Q questions, E embedding width.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vold.config.schema import MemoryConfig, PoseConfig
from vold.grading import Grader, Item
from vold.run.job import Job
from vold.selfplay.bank import Bank
from vold.selfplay.embedders import Embedder, embed_on_all_ranks
from vold.selfplay.penalties import (
    bleu_distances,
    challenger_reward,
    cluster_sizes,
    cosine_distances,
    memory_penalty,
    uncertainty,
)
from vold.selfplay.questions import QuestionParser
from vold.selfplay.voters import SolverVoters
from vold.train.group_metrics import group_metrics
from vold.train.reward_function import StepGroups
from vold.types import Group, Verdict


@dataclass(frozen=True)
class Memory:
    """The questions of earlier iterations, whose repetition is penalised (R-Diverse, MAP)."""

    bank: Bank
    iterations: Sequence[int]
    config: MemoryConfig

    def penalties(self, vectors_QE: np.ndarray) -> list[float]:
        """P of each question, before its weight."""
        nearest_Q, mean_Q = self.bank.similarity(vectors_QE, self.iterations)
        return [memory_penalty(*pair, self.config) for pair in zip(nearest_Q, mean_Q, strict=True)]


@dataclass(frozen=True)
class QuestionReward:
    """A question's reward and its parts, which are not weighted yet."""

    reward: float
    agreement: float
    repetition: float
    memory: float


@dataclass(frozen=True)
class ChallengerReward:
    """The RewardFunction of a challenger: a response has the reward of its question.

    seed            of the solver's answers in step 0; each step has the next one
    embedder        None where questions are compared by their words
    compare_code    distances between a step's questions are of embeddings, which are of code (SAM), not BLEU's
    """

    voters: SolverVoters
    parser: QuestionParser
    job: Job
    grader: Grader
    pose: PoseConfig
    seed: int
    embedder: Embedder | None = None
    compare_code: bool = False
    memory: Memory | None = None

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts on the form alone: "correct" is a response that holds a question."""
        questions = [None if item.truncated else self.parser.parse(item.response) for item in items]
        return [Verdict("correct" if question else "wrong", question, "form") for question in questions]

    def assign_rewards(self, step: int, step_groups: StepGroups) -> StepGroups:
        """Rewards of all questions of a step, compared with each other."""
        verdicts = [verdict for group in step_groups.groups for verdict in group.verdicts]
        questions = [verdict.extracted for verdict in verdicts if verdict.outcome == "correct"]
        rewards = self._question_rewards(questions, len(verdicts), step)
        remaining = iter(rewards)
        groups = [_with_rewards(group, remaining) for group in step_groups.groups]
        metrics = step_groups.metrics | group_metrics(groups) | _metrics(rewards, len(verdicts))
        return StepGroups(groups, metrics)

    def _question_rewards(self, questions: Sequence[str], responses: int, step: int) -> list[QuestionReward]:
        """`responses`: B, all responses of the step."""
        if not questions:
            return []
        votes = self.voters.vote(questions, self.job, self.grader, seed=self.seed + step)
        vectors_QE = embed_on_all_ranks(self.embedder, questions, self.job) if self.embedder else None
        memory, memory_weight = [0.0] * len(questions), 0.0
        if self.memory is not None:
            memory, memory_weight = self.memory.penalties(vectors_QE), self.memory.config.weight
        with self.job.log.phase("clusters"):
            distance_QQ = self._distances(questions, vectors_QE)
            repetition = cluster_sizes(distance_QQ, threshold=self.pose.cluster_distance) / responses
        weight = self.pose.repetition_weight
        penalties = [weight * r + memory_weight * m for r, m in zip(repetition, memory, strict=True)]
        return [
            QuestionReward(challenger_reward(vote.agreement, penalty), vote.agreement, float(r), float(m))
            for vote, penalty, r, m in zip(votes, penalties, repetition, memory, strict=True)
        ]

    def _distances(self, questions: Sequence[str], vectors_QE: np.ndarray | None) -> np.ndarray:
        """[Q, Q]"""
        if self.compare_code:
            return cosine_distances(vectors_QE)
        return bleu_distances([self.parser.token_ids(question) for question in questions])


def _with_rewards(group: Group, remaining: Iterator[QuestionReward]) -> Group:
    """The group with the next rewards for its questions, and 0 for responses without one."""
    rewards = [next(remaining).reward if verdict.outcome == "correct" else 0.0 for verdict in group.verdicts]
    return replace(group, rewards=tuple(rewards))


def _metrics(rewards: Sequence[QuestionReward], responses: int) -> dict[str, float]:
    """Means over the questions; `well_formed`: share of responses that hold one."""
    metrics = {"well_formed": len(rewards) / max(responses, 1)}
    if rewards:
        metrics |= {
            "uncertainty": statistics.fmean(uncertainty(reward.agreement) for reward in rewards),
            "repetition": statistics.fmean(reward.repetition for reward in rewards),
            "memory_penalty": statistics.fmean(reward.memory for reward in rewards),
        }
    return metrics
