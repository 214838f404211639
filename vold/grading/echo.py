"""An answer that is copied from the problem, where something had to be computed."""

from __future__ import annotations

import re

from vold.grading import literals
from vold.grading.normalise import plain_spelling
from vold.grading.structure import Named, shape, tight
from vold.grading.units import quantity

_EDGE = "[A-Za-z0-9.]"


def is_echo(answer: str, gold: str, problem: str) -> bool:
    """True where the normalised `answer`, or the value it names, stands in `problem` as it stands in the box and is not
    spelled as `gold`.

    A given that is the answer stays right: the gold's own digits, with any unit, separators or brackets.
    """
    if _spelling(answer) == _spelling(_value(gold)) or _spelling(answer) == _spelling(gold):
        return False
    text = _bare(plain_spelling(problem))
    value = _value(answer)
    candidates = {_bare(answer)} | ({_bare(value)} if _spelling(value) != _spelling(_value(gold)) else set())
    return any(_stands_in(candidate, text) for candidate in candidates)


def _value(text: str) -> str:
    found = shape(text)
    return found.relation.sides[-1] if isinstance(found, Named) else text


def _spelling(text: str) -> str:
    value = quantity(text).value
    return literals.decimal(value) or _bare(value)


def _bare(text: str) -> str:
    """Without braces, text groups, outer brackets, and the spaces that separate neither words nor digits."""
    text = re.sub(r"(\\[A-Za-z]+)\s+(?![A-Za-z])", r"\1", tight(re.sub(r"[{}]|\\text(?![A-Za-z])", " ", text)))
    return re.sub(r"(?<=\\[A-Za-z]{2}) (?=[0-9])|^[(\[]|[)\]]$", "", tight(text).replace(", ", ","))


def _stands_in(part: str, text: str) -> bool:
    if len(part) < 2:
        return False
    at = text.find(part)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(part) : at + len(part) + 2]
        inside = re.match(_EDGE, before) and re.match(_EDGE, part[0])
        if not inside and not (re.match("[A-Za-z0-9]", after) or re.match(r"\.[0-9]", after)):
            return True
        at = text.find(part, at + 1)
    return False
