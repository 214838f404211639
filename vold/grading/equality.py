"""Equality of an answer and the gold answer: rules that need no parser, then algebra on what they leave open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from vold.grading.compare import compare, is_region
from vold.grading.echo import is_echo
from vold.grading.gold import validate_gold
from vold.grading.normalise import normalise
from vold.grading.scalars import Decision, Rule, empty, first, identical, scalar_rules, words
from vold.grading.structure import Listing, Relation, Shape, shape, tight

_LETTER = re.compile(r"\(?([A-Z])\)?|\[([A-Z])\]")
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\s?[).:])\s?(.*)", re.DOTALL)
_GOLD_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\s?[).])\s?(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])|(?<![A-Za-z])or(?![A-Za-z])|\\\\")
_LETTERS = re.compile(r"\(?[A-Z]\)?(?:\s?(?:,|;|and|\s)\s?\(?[A-Z]\)?)+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")


@dataclass(frozen=True)
class Undecided:
    """A comparison left to symbolic mathematics: both answers, normalised."""

    answer: str
    gold: str


class Equality(NamedTuple):
    """(True where the answer equals the gold, the name of the rule that decided). In an `if` it is that truth value."""

    equal: bool
    rule: str

    def __bool__(self) -> bool:
        return self.equal


def equal(answer: str, gold: str, problem: str = "") -> Equality:
    """Whether `answer` equals `gold`, and by which rule. problem: see `decide`.

    Runs in this process and may run for ever on a hostile answer; `Grader` adds the time and memory limits.
    Raises ValueError for a gold answer that `validate_gold` refuses.
    """
    validate_gold(gold)
    outcome = decide(answer, gold, problem)
    if not isinstance(outcome, Undecided):
        return Equality(*outcome)
    from vold.grading.symbolic import symbolically_equal  # sympy: half a second, and nothing for the trainer

    return Equality(*symbolically_equal(outcome.answer, outcome.gold))


def decide(answer: str, gold: str, problem: str = "") -> Decision | Undecided:
    """The rules that need no parser, in order. Linear passes only: milliseconds at most.

    problem: the text that was asked, where it is known: what is copied from it is no answer (rule `echo`), and round
    brackets are an interval where it speaks of one. "" for neither.
    """
    answer, gold = normalise(answer), normalise(gold)
    spelled = first(_RULES, answer, gold)
    if spelled is not None:
        return spelled
    outcome = _by_parts(answer, gold, problem)
    may_be_right = isinstance(outcome, Undecided) or outcome[0]
    return (False, "echo") if problem and may_be_right and is_echo(answer, gold, problem) else outcome


@dataclass
class _PolicyLeaf:
    """What can be said of parts without a parser; `rule` is the last that decided."""

    rule: str = "structure"

    def scalar(self, answer: str, gold: str) -> bool | None:
        decision, _, _ = scalar_rules(answer, gold)
        if decision is None:
            return None
        self.rule = decision[1]
        return decision[0]

    def relation(self, answer: Relation, gold: Relation) -> bool | None:
        same = answer.signs == gold.signs and [*map(tight, answer.sides)] == [*map(tight, gold.sides)]
        return True if same else None

    def region(self, answer: Shape, gold: Shape) -> bool | None:
        return True if answer == gold else None

    def rounds(self, exact: str, rounded: str) -> bool | None:
        return None


def _by_parts(answer: str, gold: str, problem: str) -> Decision | Undecided:
    ours, theirs = shape(answer), shape(gold)
    if is_region(ours) and "interval" in problem.casefold() and isinstance(theirs, Listing) and theirs.kind == "pair":
        gold = rf"\in {gold}"
        theirs = shape(gold)
    if isinstance(ours, Relation) and len(ours.signs) > 1 and "=" in ours.signs:
        return False, "chain"
    leaf = _PolicyLeaf()
    verdict = compare(ours, theirs, leaf)
    return Undecided(answer, gold) if verdict is None else (verdict, leaf.rule)


def _choice(answer: str, gold: str) -> bool | None:
    """Gold `D`, `(D)` or `D. 7` is a choice: `D`, `(D)` and `D. 7` choose it, `D. 7, B. 3` chooses nothing."""
    gold_letter = _chosen(gold, _GOLD_CHOICE)
    return None if gold_letter is None else _chosen(answer, _CHOICE) == gold_letter


def _chosen(text: str, pattern: re.Pattern[str]) -> str | None:
    text = _TEXT.sub(r"\1", text).replace("*", "").strip()
    if match := _LETTER.fullmatch(text):
        return match[1] or match[2]
    match = pattern.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match[3]):
        return None
    return match[1] or match[2]


def _choices(answer: str, gold: str) -> bool | None:
    """Gold `A, C` is several choices: `C, A`, `A and C` and `AC` name both."""
    answer, gold = (_TEXT.sub(r"\1", text).replace("*", "").strip() for text in (answer, gold))
    if not _LETTERS.fullmatch(gold):
        return None
    if not (_LETTERS.fullmatch(answer) or re.fullmatch("[A-Z]+", answer)):
        return False
    ours, theirs = ([c for c in text if c.isupper()] for text in (answer, gold))
    return sorted(ours) == sorted(theirs)


_RULES: tuple[Rule, ...] = (empty, identical, _choice, _choices, words)
