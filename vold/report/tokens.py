"""A response token by token: how much surer of each the student was than the teacher, as colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .read import as_number

STEPS = (0.1, 0.5, 1.0, 3.0)  # nats: where the next stronger colour begins
ENDS = 240  # tokens shown of either end of a response; what is between is left out
WIDEST = 5


@dataclass(frozen=True)
class Token:
    """gap: log p − log p teacher, nats, NaN where the teacher was not asked. shade: "" for no colour, else u1 … u4
    where the student was surer, d1 … d4 where the teacher was."""

    text: str
    logp: float
    gap: float = math.nan

    @property
    def shade(self) -> str:
        strength = sum(abs(self.gap) >= step for step in STEPS)
        return f"{'u' if self.gap > 0 else 'd'}{strength}" if strength else ""


@dataclass(frozen=True)
class Tokens:
    """Of a long response its two ends, `left_out` tokens being between them; `widest`: those of all of it with the
    largest gaps, widest first."""

    head: list[Token]
    tail: list[Token]
    left_out: int
    widest: list[Token]
    scored: bool  # by the teacher


def tokens_of(row: Mapping[str, Any]) -> Tokens | None:
    """None for a row of samples.jsonl that does not say it of each token, or not alike of all."""
    texts, logps, teacher = (row.get(key) for key in ("tokens", "logp", "logp_teacher"))
    if not isinstance(texts, list) or not isinstance(logps, list) or len(texts) != len(logps) or not texts:
        return None
    scored = isinstance(teacher, list) and len(teacher) == len(texts)
    found = [_token(text, logp, of) for text, logp, of in zip(texts, logps, teacher if scored else logps, strict=True)]
    if not scored:
        found = [Token(token.text, token.logp) for token in found]
    cut = len(found) > 2 * ENDS
    head, tail = (found[:ENDS], found[-ENDS:]) if cut else (found, [])
    return Tokens(head, tail, len(found) - len(head) - len(tail), _widest(found), scored)


def _token(text: Any, logp: Any, teacher: Any) -> Token:
    return Token(str(text), as_number(logp), as_number(logp) - as_number(teacher))


def _widest(tokens: Sequence[Token]) -> list[Token]:
    return sorted((token for token in tokens if token.shade), key=lambda token: -abs(token.gap))[:WIDEST]
