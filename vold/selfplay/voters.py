"""The solver as voters: several of its answers to each question."""

from __future__ import annotations

from collections.abc import Sequence

from vold.config.schema import SamplingConfig
from vold.grading import Grader, extract_answer
from vold.rollout import Sampler
from vold.run.job import Job
from vold.selfplay.questions import QuestionParser, Vote, vote


class SolverVoters:
    """Votes of `responses` sampled answers of the solver as it is."""

    def __init__(self, sampler: Sampler, sampling: SamplingConfig, responses: int, parser: QuestionParser):
        self._sampler, self._sampling, self._responses, self._parser = sampler, sampling, responses, parser

    def vote(self, questions: Sequence[str], job: Job, grader: Grader, *, seed: int) -> list[Vote]:
        """The vote on each question. Equal questions are answered once; ranks share the work. All ranks call with the
        same questions."""
        unique = list(dict.fromkeys(questions))
        with job.log.phase("solver_answers"):
            votes = job.gather(self._local_votes(job.shard(unique), grader, seed))
        vote_of = dict(zip(unique, votes, strict=True))
        return [vote_of[question] for question in questions]

    def _local_votes(self, questions: Sequence[str], grader: Grader, seed: int) -> list[Vote]:
        if not questions:
            return []
        prompts = [self._parser.prompt(question) for question in questions]
        rollouts = self._sampler.sample(prompts, self._sampling, responses=self._responses, seed=seed)
        answers = [None if r.finish_reason == "length" else extract_answer(r.text) for r in rollouts]
        size = self._responses
        return vote([answers[first : first + size] for first in range(0, len(answers), size)], grader)
