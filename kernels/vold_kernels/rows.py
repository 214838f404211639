"""The two row functions every kernel here is made of, and the one place that picks who computes them.

Shape letters: C tokens of a chunk, U vocabulary rows of this rank, B columns of one tile of them. `Acc` is fp32 (fp64
for fp64 inputs). x is a logit after temperature; columns at or beyond `real − first` are padding, i.e. −inf.

    fold_(folded_4C, z_CB, target_C, real, first)
        Folds one tile into the running statistics of its tokens, in place:
            0  top     max x
            1  total   Σ e^(x − top)                 ≥ 1 once a column was seen
            2  spread  Σ (x − top) e^(x − top)       ≤ 0; entropy needs no difference of large numbers
            3  target  x at the target column, 0 until a tile owns it

    dlogits_(dz_CU, z_CU, target_C, real, statistics, d_logp_C, d_entropy_C)
        Gradient of Σ d_logp·logp + d_entropy·entropy with respect to x, written over x:
            dz = d_logp (1[x is the target] − p) − d_entropy p (log p + entropy),   exactly 0 in padding.
        dz may be z itself, or a narrower dtype in z's storage (`dlogits_storage`). d_entropy_C None skips the term.

target_C (int64) is local to the rank's rows and may lie outside them; `real` is a 0-dim int64 tensor on the device;
`first` is the tile's first column within the rank's rows. Both backends process a row's columns in order, in blocks
that divide a tile, so tiled and resident folds of equal logits agree to the bit.
"""

import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

EMPTY = -1e30  # the max of no columns: finite, so that EMPTY − EMPTY and 0 · EMPTY stay numbers


@dataclass(frozen=True)
class Statistics:
    """Of the softmax over the whole vocabulary. log p = (x − top) − log_total: two small steps, no large difference."""

    top_C: Tensor
    log_total_C: Tensor
    logp_C: Tensor
    """≤ 0 by construction: x ≤ top and total ≥ 1. NaN where the target is no real row."""
    entropy_C: Tensor

    def rows(self, index: Tensor | slice) -> "Statistics":
        return Statistics(*(value[index] for value in vars(self).values()))


def row_functions(device: torch.device) -> ModuleType:
    """Triton on a GPU and under its interpreter, plain torch otherwise."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from . import rows_triton

        return rows_triton
    from . import rows_torch

    return rows_torch


def new_statistics(tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    folded_4C = torch.zeros(4, tokens, dtype=dtype, device=like.device)
    folded_4C[0] = EMPTY
    return folded_4C


def dlogits_storage(z_CU: Tensor, dtype: torch.dtype) -> Tensor:
    """The front half of each row of z, seen as `dtype`: what the next matmul wants, without a second chunk."""
    return z_CU if dtype == z_CU.dtype else z_CU.view(dtype)[:, : z_CU.shape[1]]
