"""A response token by token, coloured by the gap between the student's and the teacher's log-probs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .read import as_number

SHADES = (0.1, 0.5, 1.0, 3.0)  # nats: where the next stronger colour begins
ENDS = 240  # tokens shown of either end of a response; those between are left out
WIDEST = 5


@dataclass(frozen=True)
class Token:
    """gap: log p − log p teacher, nats, NaN where the teacher did not score the token."""

    text: str
    logp: float
    gap: float

    @property
    def shade(self) -> str:
        """CSS class: u1 … u4 where the student is surer, d1 … d4 where the teacher is, "" for no colour."""
        strength = sum(abs(self.gap) >= step for step in SHADES)
        return f"{'u' if self.gap > 0 else 'd'}{strength}" if strength else ""


@dataclass(frozen=True)
class Tokens:
    """The two ends of a response, `left_out` tokens being between them.

    widest   the tokens of all of it with the largest gaps, widest first
    scored   whether the teacher scored the response
    """

    head: list[Token]
    tail: list[Token]
    left_out: int
    widest: list[Token]
    scored: bool


def tokens_of(row: Mapping[str, Any]) -> Tokens | None:
    """Read the tokens of a row of samples.jsonl; None where they are missing or their columns differ in length."""
    texts, logps, teacher = (row.get(key) for key in ("tokens", "logp", "logp_teacher"))
    if not isinstance(texts, list) or not isinstance(logps, list) or len(texts) != len(logps) or not texts:
        return None
    scored = isinstance(teacher, list) and len(teacher) == len(texts)
    columns = zip(texts, map(as_number, logps), teacher if scored else [math.nan] * len(texts), strict=True)
    tokens = [Token(str(text), logp, logp - as_number(logp_teacher)) for text, logp, logp_teacher in columns]
    head, tail = (tokens[:ENDS], tokens[-ENDS:]) if len(tokens) > 2 * ENDS else (tokens, [])
    widest = sorted((token for token in tokens if token.shade), key=lambda token: -abs(token.gap))[:WIDEST]
    return Tokens(head, tail, len(tokens) - len(head) - len(tail), widest, scored)
