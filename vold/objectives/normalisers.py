"""Normalisers: the weight of each token in the loss of one update. B: responses of the update, over all ranks.

Computed from lengths alone, before any micro-batch exists, so that no split of the batch can change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Normaliser = Callable[[Sequence[int], int], list[float]]
"""(lengths_B in tokens, the longest response that is sampled) -> weights_B of one token of each response"""


def tokens(lengths_B: Sequence[int], longest: int) -> list[float]:
    """1 / sum of lengths: every token counts alike (DAPO; VOLD)."""
    return [1.0 / max(sum(lengths_B), 1)] * len(lengths_B)


def sequences(lengths_B: Sequence[int], longest: int) -> list[float]:
    """1 / (B length): every response counts alike, a token of a long one less (GRPO as published; GSPO)."""
    return [1.0 / (len(lengths_B) * max(length, 1)) for length in lengths_B]


def constant(lengths_B: Sequence[int], longest: int) -> list[float]:
    """1 / (B longest): neither the length of a response nor those of the others weigh on a token (Dr.GRPO)."""
    return [1.0 / (len(lengths_B) * longest) for _ in lengths_B]


NORMALISERS: dict[str, Normaliser] = {"tokens": tokens, "sequences": sequences, "constant": constant}
