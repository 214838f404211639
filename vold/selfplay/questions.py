"""From a challenger's response to the solver's training data: the question in it, the majority answer, batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vold.config.schema import AnswersConfig, PromptConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.grading import Grader, Item, normal_form, validate_gold
from vold.models.chat_template import load_chat_tokenizer
from vold.types import Prompt

ItemT = TypeVar("ItemT")


class QuestionParser:
    """Extracts a well-formed question for one solver: it matches `pattern`, fits into the prompt, and has no control
    token."""

    def __init__(self, pattern: str, prompt: PromptConfig, solver: Path):
        self._pattern = re.compile(pattern, re.DOTALL)
        self._prompt, self.tokenizer = prompt, load_chat_tokenizer(solver, prompt)
        special = self.tokenizer.added_tokens_decoder.items()
        self._control_ids = {token_id for token_id, token in special if token.special}

    def parse(self, response: str) -> str | None:
        """The question, or None where the response is not well formed."""
        question = find_question(response, self._pattern)
        if question is None or self._control_ids & set(self.token_ids(question)):
            return None
        fits = len(self.prompt(question).token_ids) <= self._prompt.max_tokens
        return question if fits else None

    def token_ids(self, question: str) -> list[int]:
        """The question's token ids: the words of BLEU (R-Zero splits at spaces, which makes a formula one word)."""
        return self.tokenizer(question, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> Prompt:
        """The solver's prompt for the question."""
        return build_prompt(Problem("posed", question), self.tokenizer, self._prompt)


@dataclass(frozen=True)
class Vote:
    """The solver's majority answer to a question, and the share of all responses that give it. No answer at all: label
    "", agreement 0."""

    label: str
    agreement: float


def find_question(response: str, pattern: re.Pattern[str]) -> str | None:
    """Group 1 of the last match, stripped; None where there is no match or it is empty."""
    matches = list(pattern.finditer(response))
    question = matches[-1][1].strip() if matches and matches[-1][1] else ""
    return question or None


def vote(answers: Sequence[Sequence[str | None]], grader: Grader) -> list[Vote]:
    """The vote over the answers to each question; None is a response without an answer, which counts in the share.

    Two answers are the same where the grader finds each equal to the other (`1/2`, `0.5`). An answer has the votes of
    all that are the same; of equally frequent ones the most frequent spelling wins, then the shortest, then the first
    by its characters. So the order of the answers does not matter.
    """
    spellings = [_count_spellings(question_answers) for question_answers in answers]
    pairs = [(n, a, g) for n, counts in enumerate(spellings) for a in counts for g in counts if a != g]
    verdicts = grader.grade([Item(rf"\boxed{{{answer}}}", gold) for _, answer, gold in pairs])
    right = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.outcome == "correct"}
    votes = []
    for number, (counts, question_answers) in enumerate(zip(spellings, answers, strict=True)):
        support = {
            label: sum(n for a, n in counts.items() if a == label or {(number, a, label), (number, label, a)} <= right)
            for label in counts
        }
        label = min(support, key=lambda s: (-support[s], -counts[s], len(s), s), default="")
        votes.append(Vote(label, support.get(label, 0) / max(len(question_answers), 1)))
    return votes


def _count_spellings(answers: Sequence[str | None]) -> dict[str, int]:
    """Count of each answer, by its normal form. Answers that the grader could not compare are left out."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None and _can_be_gold(answer) and _can_be_gold(spelling := normal_form(answer)):
            counts[spelling] = counts.get(spelling, 0) + 1
    return counts


def _can_be_gold(answer: str) -> bool:
    try:
        validate_gold(answer)
    except ValueError:
        return False
    return True


def is_informative(vote: Vote, config: AnswersConfig) -> bool:
    """True where `lowest` to `highest` answers agree: the question is neither solved nor hopeless (R-Zero: 3 to 7 of
    10)."""
    agreeing = round(vote.agreement * config.responses)
    return bool(vote.label) and config.lowest <= agreeing <= config.highest


def solver_batches(
    fresh: Sequence[ItemT], banked: Sequence[ItemT], *, steps: int, per_step: int, replay: float, seed: int
) -> list[ItemT]:
    """The items of `steps` batches, one batch after the other: `replay` of each (to the nearest item) comes from
    earlier iterations, the rest from this one. Both are passed through in random order, repeatedly. Where nothing is
    banked, all are fresh."""
    rng = np.random.default_rng([seed, len(fresh), len(banked)])
    old = round(replay * per_step) if banked else 0
    news, olds = _cycle(fresh, steps * (per_step - old), rng), _cycle(banked, steps * old, rng)
    batches = (
        news[step * (per_step - old) : (step + 1) * (per_step - old)] + olds[step * old : (step + 1) * old]
        for step in range(steps)
    )
    return [item for batch in batches for item in batch]


def _cycle(items: Sequence[ItemT], count: int, rng: np.random.Generator) -> list[ItemT]:
    """`count` items: whole permutations one after the other, the last one cut."""
    cycled: list[ItemT] = []
    while len(cycled) < count:
        cycled += [items[index] for index in rng.permutation(len(items))]
    return cycled[:count]
