"""Equality of an answer and the gold answer, rule by rule; math-verify decides the remaining cases.

math-verify 0.9 is a lenient *comparer*: it takes the last number of `1=2=7`, treats words as products of letters,
drops units and rounds tiny numbers to zero. Each rule below decides one such case before math-verify runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vold.grading import literals
from vold.grading.gold import validate_gold
from vold.grading.normalise import normalise
from vold.grading.units import quantity, same_unit

Decision = tuple[bool, str]
Rule = Callable[[str, str], bool | None]

_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\s?[).:])\s?(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?:^|[\s,;])\(?[A-J]\s?(?:[).:,]|$)|(?<![A-Za-z])or(?![A-Za-z])")
_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_INDEX = re.compile(r"_\{[^{}]*\}|_.")
_EQUALS = re.compile(r"=|\\(?:approx|equiv|simeq|cong)(?![A-Za-z])")
_BASED = re.compile(r"(?<![A-Za-z0-9_^{\\])(?:[0-9][0-9A-Z]*|\([0-9A-Z]+\))_(?:\{[0-9]+\}|[0-9])")
_RATIO = re.compile(r"[0-9}]\s?:\s?[\\0-9-]")
_SIDE_BY_SIDE = re.compile(r"(?<![_^])[0-9] [0-9]")
_MARKS = (r"\%", r"\$", r"^\circ", "€", "£", "¥", "₹", "'", r"\ldots")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")


@dataclass(frozen=True)
class Undecided:
    """A comparison left to symbolic mathematics: the two values, without names and agreed units."""

    answer: str
    gold: str


def equal(answer: str, gold: str) -> Decision:
    """(True where `answer` equals `gold`, the name of the rule that decided).

    Runs in this process and may run for ever on a hostile answer; `Grader` adds the time and memory limits.
    Raises ValueError for a gold answer that `validate_gold` refuses.
    """
    validate_gold(gold)
    outcome = decide(answer, gold)
    if not isinstance(outcome, Undecided):
        return outcome
    from vold.grading.symbolic import symbolically_equal  # sympy: half a second, and nothing for the trainer

    return symbolically_equal(outcome.answer, outcome.gold)


def decide(answer: str, gold: str) -> Decision | Undecided:
    """The rules that need no parser, in order. Linear passes only: milliseconds at most."""
    answer, gold = normalise(answer), normalise(gold)
    decision = _first(_SPELLING_RULES, answer, gold)
    if decision is not None:
        return decision
    answer, gold = _without_name(answer, gold)
    ours, theirs = quantity(answer), quantity(gold)
    match same_unit(ours, theirs):
        case False:
            return False, "units"
        case True:
            answer, gold = ours.value, theirs.value
    return _first(_VALUE_RULES, answer, gold) or Undecided(answer, gold)


def _first(rules: tuple[Rule, ...], answer: str, gold: str) -> Decision | None:
    for rule in rules:
        verdict = rule(answer, gold)
        if verdict is not None:
            return verdict, rule.__name__.strip("_")
    return None


def _empty(answer: str, gold: str) -> bool | None:
    return None if answer else False


def _identical(answer: str, gold: str) -> bool | None:
    return True if answer == gold else None


def _choice(answer: str, gold: str) -> bool | None:
    """Gold `D`, `(D)` or `D. 7` is a choice: `D`, `(D)` and `D. 7` choose it, `D. 7, B. 3` chooses nothing."""
    gold_letter = _chosen(gold)
    return None if gold_letter is None else _chosen(answer) == gold_letter


def _chosen(text: str) -> str | None:
    text = _TEXT.sub(r"\1", text).replace("*", "")
    if match := _LETTER.fullmatch(text):
        return match[1]
    match = _CHOICE.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match[3]):
        return None
    return match[1] or match[2]


def _words(answer: str, gold: str) -> bool | None:
    """Words are equal letter by letter, whatever their case; single letters keep it. `no` is not `on`."""
    answer_is_words, gold_is_words = _is_words(answer), _is_words(gold)
    if answer_is_words and gold_is_words:
        return _spell(answer) == _spell(gold)
    if gold_is_words:
        return None if len(gold) == 1 else False
    if answer_is_words and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", gold)):
        return False
    return None


def _is_words(text: str) -> bool:
    parts = re.split(r"[ '-]", _TEXT.sub(r"\1", text))
    if "-" in text and min(map(len, parts)) < 3:  # x-y is a difference, north-east a word
        return False
    return all(part.isalpha() for part in parts if part) and any(parts)


def _spell(text: str) -> str:
    text = " ".join(_TEXT.sub(r"\1", text).split())
    return text if len(text) == 1 else text.casefold()


def _chain(answer: str, gold: str) -> bool | None:
    """An answer commits to one value: `1=2=7` and `3=7` are refused, `x=7` and `x=1, y=2` are not."""
    for part in _SEPARATOR.split(_INDEX.sub("", answer)):
        sides = _EQUALS.split(part)
        if len(sides) > 2:
            return False
        if len(sides) == 2 and not re.search(
            "[A-Za-z]", re.sub(r"\\(?:frac|sqrt|text|cdot|times|div|pm)", "", sides[0])
        ):
            return False
    return None


def _without_name(answer: str, gold: str) -> tuple[str, str]:
    """`x = 7` -> `7` where only one of the two answers is named."""
    names = _equals(answer), _equals(gold)
    if names == (1, 0):
        return _right_side(answer), gold
    if names == (0, 1):
        return answer, _right_side(gold)
    return answer, gold


def _equals(text: str) -> int:
    return len(_EQUALS.findall(_INDEX.sub("", text)))


def _right_side(text: str) -> str:
    return text if _SEPARATOR.search(text) or "_{" in text else _EQUALS.split(text)[-1].strip()


def _base(answer: str, gold: str) -> bool | None:
    """`101_2` is not `101_3`: digits and base compared as written."""
    if _BASED.search(answer) or _BASED.search(gold):
        return _compact(answer) == _compact(gold)
    return None


def _ratio(answer: str, gold: str) -> bool | None:
    """`3:30`, `1:2:3`: compared as written, neither reduced nor divided."""
    if _RATIO.search(answer) or _RATIO.search(gold):
        return _compact(answer) == _compact(gold)
    return None


def _compact(text: str) -> str:
    return re.sub(r"[\s{}()]", "", text).casefold()


def _number(answer: str, gold: str) -> bool | None:
    return literals.compare(answer, gold)


def _marks(answer: str, gold: str) -> bool | None:
    """Percent, degree, currency, dots and words *inside* an answer (a list, say) must occur on both sides."""
    if any(answer.count(mark) != gold.count(mark) for mark in _MARKS):
        return False
    return None if sorted(_TEXT.findall(answer)) == sorted(_TEXT.findall(gold)) else False


def _side_by_side(answer: str, gold: str) -> bool | None:
    """`3 4` is two numbers; math-verify reads a mixed number and adds them to 7."""
    return False if _SIDE_BY_SIDE.search(answer) else None


def _brackets(answer: str, gold: str) -> bool | None:
    r"""`\{1,2\}` is not the pair or interval `(1,2)`; a bare list `1,2` may be either."""
    kinds = {_bracket(answer), _bracket(gold)}
    return False if kinds == {"set", "pair"} else None


def _bracket(text: str) -> str | None:
    if "," not in text:
        return None
    if text.startswith(("\\{", "{")) and text.endswith("}"):
        return "set"
    return "pair" if text[0] in "([" and text[-1] in ")]" else None


_SPELLING_RULES: tuple[Rule, ...] = (_empty, _identical, _choice, _words, _chain)
_VALUE_RULES: tuple[Rule, ...] = (_empty, _identical, _base, _ratio, _number, _marks, _side_by_side, _brackets)
