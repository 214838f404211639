"""Normalisers: the weight of each token in the loss of one update. B: responses of the update, over all ranks.

Computed from lengths alone, before any micro-batch exists, so that no split of the batch can change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Normaliser = Callable[[Sequence[int], int], list[float]]
"""(lengths_B in tokens, max_response_tokens) -> weights_B of one token of each response"""


def tokens(lengths_B: Sequence[int], max_response_tokens: int) -> list[float]:
    """1 / sum of lengths: every token has the same weight (DAPO; VOLD)."""
    return [1.0 / max(sum(lengths_B), 1)] * len(lengths_B)


def sequences(lengths_B: Sequence[int], max_response_tokens: int) -> list[float]:
    """1 / (B length): every response has the same weight (GRPO as published; GSPO)."""
    return [1.0 / (len(lengths_B) * max(length, 1)) for length in lengths_B]


def constant(lengths_B: Sequence[int], max_response_tokens: int) -> list[float]:
    """1 / (B max_response_tokens): independent of every response's length (Dr.GRPO)."""
    return [1.0 / (len(lengths_B) * max_response_tokens) for _ in lengths_B]


NORMALISERS: dict[str, Normaliser] = {"tokens": tokens, "sequences": sequences, "constant": constant}
