"""Softmax statistics of a chunk of logits, and where the gradient of those logits is stored.

Shape letters: C tokens of a chunk, U vocabulary rows of this rank. `Acc` is fp32 (fp64 for fp64 inputs).

Running statistics are one [4, C] `Acc` tensor, folded_4C, which `fold_` (`rows.py`) updates tile by tile:
    0  max      max x over the columns seen so far; EMPTY before the first
    1  sum      Σ e^(x − max)               ≥ 1 once a column was seen
    2  gap sum  Σ (x − max) e^(x − max)     ≤ 0; the entropy then needs no difference of large numbers
    3  target   x at the target column, 0 until a tile contains it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1e30  # the max of no columns: finite, so that EMPTY − EMPTY and 0 · EMPTY stay numbers


@dataclass(frozen=True)
class SoftmaxStatistics:
    """Softmax over the vocabulary, [C] `Acc` each. log p = (x − max) − log_sum avoids a difference of large numbers."""

    max_C: Tensor
    """max x."""
    log_sum_C: Tensor
    """log Σ e^(x − max), ≥ 0."""
    logp_C: Tensor
    """Log-prob of the target (nats), ≤ 0 by construction: x ≤ max and sum ≥ 1. NaN where the target is no real row."""
    entropy_C: Tensor
    """Entropy (nats)."""

    def select(self, index: Tensor | slice) -> "SoftmaxStatistics":
        """The statistics of some tokens."""
        return SoftmaxStatistics(*(value[index] for value in vars(self).values()))


def empty_statistics(tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[4, tokens] running statistics of no columns."""
    folded_4C = torch.zeros(4, tokens, dtype=dtype, device=like.device)
    folded_4C[0] = EMPTY
    return folded_4C


def dlogits_storage(z_CU: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, U] view in `dtype` of the front of each row of z_CU: the gradient overwrites the logits it came from."""
    return z_CU if dtype == z_CU.dtype else z_CU.view(dtype)[:, : z_CU.shape[1]]
