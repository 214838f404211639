"""Who judges a challenger: its questions are answered by the solver as it stands, and held against each other and
against the memory bank (R-Zero, R-Diverse).

Shape letters: Q questions, E embedding width.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vold.config.schema import PromptConfig, SamplingConfig, SelfplayConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.grading import Grader, extract_answer
from vold.models.tokenizer import load_tokenizer
from vold.rollout import open_sampler
from vold.run.job import Job
from vold.selfplay.bank import Bank
from vold.selfplay.embedders import CodeEmbedder, Embedder, EncoderEmbedder
from vold.selfplay.penalties import (
    bleu_distances,
    challenger_reward,
    cluster_sizes,
    cosine_distances,
    memory_penalty,
    uncertainty,
)
from vold.selfplay.questions import Vote, find_question, vote
from vold.train.groups import StepGroups, group_metrics
from vold.types import Group, Verdict


class QuestionForm:
    """What of a response is a question for this solver: pattern, length, and no control token among its words."""

    def __init__(self, config: SelfplayConfig, solver: Path):
        self._pattern = re.compile(config.pose.pattern, re.DOTALL)
        self._prompt, self.tokenizer = config.prompt, load_tokenizer(solver)
        special = self.tokenizer.added_tokens_decoder.items()
        self._control = {number for number, token in special if token.special}

    def find(self, response: str) -> str | None:
        """The question, or None where the form is bad."""
        question = find_question(response, self._pattern)
        if question is None or self._control & set(self.words(question)):
            return None
        fits = len(self.prompt(question).token_ids) <= self._prompt.max_tokens
        return question if fits else None

    def words(self, question: str) -> list[int]:
        """Its token ids: BLEU's words (R-Zero splits at spaces, which leaves a formula one word)."""
        return self.tokenizer(question, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str):
        """The question as the solver is asked."""
        return build_prompt(Problem("posed", question), self.tokenizer, self._prompt)


class SolverVoters:
    """The solver as it stands, answering each question several times."""

    def __init__(self, config: SelfplayConfig, solver: Path, form: QuestionForm, job: Job, grader: Grader):
        self._responses, self._sampling = config.answers.responses, config.solver.rollout
        self._form, self._job, self._grader = form, job, grader
        self._sampler = open_sampler(self._sampling, solver, dtype=job.dtype, device=job.layout.device)

    def ask(self, questions: Sequence[str], *, seed: int) -> list[Vote]:
        """The vote on each question. Equal questions are asked once; ranks share the work. All ranks call alike."""
        unique = list(dict.fromkeys(questions))
        with self._job.log.phase("solver_answers"):
            found = self._job.gather(self._votes(self._job.share(unique), seed))
        votes = dict(zip(unique, found, strict=True))
        return [votes[question] for question in questions]

    def _votes(self, questions: Sequence[str], seed: int) -> list[Vote]:
        if not questions:
            return []
        prompts = [self._form.prompt(question) for question in questions]
        rollouts = self._sampler.sample(prompts, self._sampling, responses=self._responses, seed=seed)
        answers = [None if r.finish_reason == "length" else extract_answer(r.text) for r in rollouts]
        each = self._responses
        return vote([answers[k : k + each] for k in range(0, len(answers), each)], self._grader)


def open_embedder(config: SelfplayConfig, *, dtype: torch.dtype, device: torch.device) -> Embedder | None:
    """What a config compares questions by: nothing, their words, or their code (SAM)."""
    if config.embedder is None:
        return None
    encoder, coder = EncoderEmbedder(config.embedder, device=device), config.coder
    if coder is None:
        return encoder
    tokenizer = load_tokenizer(coder.checkpoint)

    def prompt(question: str):
        request = Problem("coder", coder.request.replace("{question}", question))
        return build_prompt(request, tokenizer, PromptConfig(suffix=""))

    sampling = SamplingConfig(
        max_new_tokens=coder.max_new_tokens, temperature=0.0, sequences_per_call=coder.sequences_per_call
    )
    sampler = open_sampler(coder, coder.checkpoint, dtype=dtype, device=device)
    return CodeEmbedder(sampler, prompt, sampling, encoder)


def embed_together(embedder: Embedder, questions: Sequence[str], job: Job) -> np.ndarray:
    """float32 [Q, E]; equal questions are embedded once, and ranks share the work."""
    unique = list(dict.fromkeys(questions))
    with job.log.phase("embed"):
        mine = job.share(unique)
        rows = job.gather(list(embedder.embed(mine)) if mine else [])
    places = {question: place for place, question in enumerate(unique)}
    return np.stack([rows[places[question]] for question in questions]) if rows else np.zeros((0, 1), np.float32)


@dataclass(frozen=True)
class Worth:
    """A posed question's reward with its parts, before their weights."""

    reward: float
    agreement: float
    repetition: float
    memory: float


class Challenge:
    """The Judge of a challenger (see vold.train.groups): a response is worth what its question is."""

    def __init__(
        self,
        config: SelfplayConfig,
        panel: SolverVoters,
        form: QuestionForm,
        job: Job,
        *,
        bank: Bank,
        remembered: Sequence[int],
        seed: int,
    ):
        """remembered: the bank's iterations so far; seed: of this iteration's answers."""
        self._config, self._panel, self._form, self._job = config, panel, form, job
        self._bank, self._remembered, self._seed = bank, remembered, seed
        self._embedder = open_embedder(config, dtype=job.dtype, device=job.layout.device)

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """The form alone: "correct" is a response that holds a question."""
        questions = [None if truncated else self._form.find(response) for response, _, truncated in items]
        return [Verdict("correct" if question else "wrong", question, "form") for question in questions]

    def compare(self, step: int, drawn: StepGroups) -> StepGroups:
        """Rewards of a whole step's questions."""
        verdicts = [verdict for group in drawn.groups for verdict in group.verdicts]
        posed = [verdict.extracted for verdict in verdicts if verdict.outcome == "correct"]
        worths = self._worths(posed, len(verdicts), step)
        one_by_one = iter(worths)
        groups = [_rewarded(group, one_by_one) for group in drawn.groups]
        return StepGroups(groups, drawn.metrics | group_metrics(groups) | _metrics(worths, len(verdicts)))

    def _worths(self, posed: Sequence[str], batch: int, step: int) -> list[Worth]:
        """`batch`: B, all responses of the step."""
        if not posed:
            return []
        memory_config, pose = self._config.memory, self._config.pose
        votes = self._panel.ask(posed, seed=self._seed + step)
        vectors_QE = embed_together(self._embedder, posed, self._job) if self._embedder else None
        memory, memory_weight = [0.0] * len(posed), 0.0
        if memory_config is not None:
            nearest_Q, mean_Q = self._bank.similarity(vectors_QE, self._remembered)
            memory = [memory_penalty(*pair, memory_config) for pair in zip(nearest_Q, mean_Q, strict=True)]
            memory_weight = memory_config.weight
        with self._job.log.phase("clusters"):
            distance_QQ = self._distances(posed, vectors_QE)
            repetition = cluster_sizes(distance_QQ, threshold=pose.cluster_distance) / batch
        penalties = [pose.repetition_weight * r + memory_weight * m for r, m in zip(repetition, memory, strict=True)]
        return [
            Worth(challenger_reward(answer.agreement, penalty), answer.agreement, float(r), float(m))
            for answer, penalty, r, m in zip(votes, penalties, repetition, memory, strict=True)
        ]

    def _distances(self, posed: Sequence[str], vectors_QE: np.ndarray | None) -> np.ndarray:
        """By code where there is a coder (SAM), else by words."""
        if self._config.coder is not None:
            return cosine_distances(vectors_QE)
        return bleu_distances([self._form.words(question) for question in posed])


def _rewarded(group: Group, worths) -> Group:
    rewards = [next(worths).reward if verdict.outcome == "correct" else 0.0 for verdict in group.verdicts]
    return replace(group, rewards=tuple(rewards))


def _metrics(worths: Sequence[Worth], responses: int) -> dict[str, float]:
    """Means over the questions; `well_formed`: share of responses that hold one."""
    shown = {"well_formed": len(worths) / max(responses, 1)}
    if worths:
        shown |= {
            "uncertainty": statistics.fmean(uncertainty(worth.agreement) for worth in worths),
            "repetition": statistics.fmean(worth.repetition for worth in worths),
            "memory_penalty": statistics.fmean(worth.memory for worth in worths),
        }
    return shown
