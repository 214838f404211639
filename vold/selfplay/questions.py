"""From a challenger's response to a question that the solver may learn from: form, majority answer, batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vold.config.schema import AnswersConfig
from vold.grading import Grader, validate_gold
from vold.grading.normalise import normalise

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Vote:
    """What the solver thinks of a question: the answer that most responses give, and the share of all responses that
    gives it. No answer at all: label "", agreement 0."""

    label: str
    agreement: float


def find_question(response: str, pattern: re.Pattern[str]) -> str | None:
    """Group 1 of the last match, stripped; None: the response has not the form that was asked for."""
    found = list(pattern.finditer(response))
    question = found[-1][1].strip() if found and found[-1][1] else ""
    return question or None


def vote(answers: Sequence[Sequence[str | None]], grader: Grader) -> list[Vote]:
    """For each question the vote over its answers; None: a response without one, which still counts in the share.

    Two answers are the same where the grader says so (`1/2`, `0.5`). Round by round each question's first answer that
    is left is compared with all others that are left; of equally many, the one that came first is the majority.
    """
    left = [_spellings(found) for found in answers]
    best: list[tuple[int, str]] = [(0, "")] * len(answers)
    while any(left):
        leaders = [next(iter(spellings), None) for spellings in left]
        asked = [(number, spelling) for number, spellings in enumerate(left) for spelling in list(spellings)[1:]]
        verdicts = grader.grade([(rf"\boxed{{{spelling}}}", leaders[number], False) for number, spelling in asked])
        equal = {pair for pair, verdict in zip(asked, verdicts, strict=True) if verdict.outcome == "correct"}
        for number, leader in enumerate(leaders):
            if leader is not None:
                same = [leader, *(spelling for of, spelling in equal if of == number)]
                count = sum(left[number].pop(spelling) for spelling in same)
                best[number] = max(best[number], (count, leader), key=lambda found: found[0])
    return [Vote(label, count / max(len(found), 1)) for (count, label), found in zip(best, answers, strict=True)]


def _spellings(answers: Sequence[str | None]) -> dict[str, int]:
    """How often each answer was given, by its canonical spelling, in order; without those no grader could hold against
    another."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None and _can_be_gold(spelling := normalise(answer)):
            counts[spelling] = counts.get(spelling, 0) + 1
    return counts


def _can_be_gold(answer: str) -> bool:
    try:
        validate_gold(answer)
    except ValueError:
        return False
    return True


def informative(found: Vote, config: AnswersConfig) -> bool:
    """Whether `lowest` to `highest` of the answers agree: neither known nor hopeless (R-Zero: 3 to 7 of 10)."""
    agreeing = round(found.agreement * config.responses)
    return bool(found.label) and config.lowest <= agreeing <= config.highest


def solver_batches(
    fresh: Sequence[ItemT], banked: Sequence[ItemT], *, steps: int, per_step: int, replay: float, seed: int
) -> list[ItemT]:
    """What each of `steps` batches reads, batch after batch: `replay` of it (to the nearest whole question) comes from
    earlier iterations, the rest from this one; either is gone through in random order, again and again. Where there is
    nothing to replay, all are fresh."""
    rng = np.random.default_rng([seed, len(fresh), len(banked)])
    old = round(replay * per_step) if banked else 0
    news, olds = _cycle(fresh, steps * (per_step - old), rng), _cycle(banked, steps * old, rng)
    batches = (
        news[step * (per_step - old) : (step + 1) * (per_step - old)] + olds[step * old : (step + 1) * old]
        for step in range(steps)
    )
    return [item for batch in batches for item in batch]


def _cycle(items: Sequence[ItemT], count: int, rng: np.random.Generator) -> list[ItemT]:
    """`count` items: whole permutations after each other, the last one cut."""
    drawn: list[ItemT] = []
    while len(drawn) < count:
        drawn += [items[place] for place in rng.permutation(len(items))]
    return drawn[:count]
