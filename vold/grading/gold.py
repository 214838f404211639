"""Checks of gold answers when the data is loaded, so that a bad row stops no training step."""

from __future__ import annotations

import re

from vold.grading import literals
from vold.grading.extract import extract_answer
from vold.grading.normalise import normalise
from vold.grading.structure import Named, shape

MAX_GOLD_CHARS = 4096
_MISSING = frozenset({"nan", "<na>", "nat", "null", "n/a", "#n/a", "-nan", "+nan"})  # how tables write a missing value
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def validate_gold(gold: str) -> str:
    r"""`gold` as it is compared. Raises ValueError with one line unless the response `\boxed{gold}` would be correct.

    Unusable: not a string, empty once markup is removed, longer than `MAX_GOLD_CHARS`, with unbalanced braces, or not
    what is extracted from its own box (it holds another one, or a thinking tag), or a missing value such as NaN.
    """
    if not isinstance(gold, str):
        raise ValueError(f"gold answer must be a string, got {type(gold).__name__} {gold!r}; quote it in the data")
    if len(gold) > MAX_GOLD_CHARS:
        raise ValueError(
            f"gold answer has {len(gold)} characters, at most {MAX_GOLD_CHARS}; keep only the final answer"
        )
    if not _balanced(gold):
        raise ValueError(f"gold answer {gold[:80]!r} has unbalanced braces; fix or drop the row")
    normal = normalise(gold)
    if not normal:
        raise ValueError(f"gold answer {gold[:80]!r} is empty; fill it in or drop the row")
    if normal.casefold() in _MISSING:
        raise ValueError(f"gold answer {gold[:80]!r} is a missing value; fill it in or drop the row")
    if normalise(extract_answer(rf"\boxed{{{gold}}}") or "") != normal:
        raise ValueError(f"gold answer {gold[:80]!r} holds a box or a thinking tag; keep only the final answer")
    return normal


def _balanced(text: str) -> bool:
    depth = 0
    for brace in _BRACE.findall(text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0


def normal_form(answer: str) -> str:
    """`answer` as a gold made of it: no name or markup, numbers in lowest terms (`x = 2/4` -> `\\frac{1}{2}`)."""
    text = normalise(answer)
    found = shape(text)
    if isinstance(found, Named) and "in" not in found.relation.signs:
        text = found.relation.sides[-1]
    value = literals.rational(text)
    if value is None:
        return text
    plain = literals.decimal(text)
    if plain is not None or value.denominator == 1:
        return plain or str(value)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
