"""The two row functions that every loss is made of, and the choice of backend for them.

Shape letters: C tokens of a chunk, U vocabulary rows of this rank, B columns of one tile of them. `Acc` is fp32 (fp64
for fp64 inputs). x is a logit after temperature; columns at or beyond `real_columns − first` are padding: x = −inf.

    fold_(folded_4C, z_CB, target_C, real_columns, first)
        Online softmax: updates the running statistics of each token (`softmax.py`) with one tile of logits, in place.

    dlogits_(dz_CU, z_CU, target_C, real_columns, statistics, d_logp_C, d_entropy_C)
        Gradient of Σ d_logp · logp + d_entropy · entropy with respect to x, written over x:
            dz = d_logp (1[x is the target] − p) − d_entropy p (log p + entropy),   exactly 0 in padding.
        dz may be z itself, or a narrower dtype in z's storage (`softmax.dlogits_storage`). d_entropy_C None skips the
        second term.

target_C (int64) counts from the rank's first row and may lie outside its rows; `real_columns` is a 0-dim int64 tensor
on the device; `first` is the tile's first column within the rank's rows. Both backends process a row's columns in
order, in blocks that divide a tile, so tiled and resident folds of equal logits agree to the bit.
"""

import os
from types import ModuleType

import torch

from . import rows_torch


def uses_triton(device: torch.device) -> bool:
    """True on a GPU and under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def row_functions(device: torch.device) -> ModuleType:
    """The backend for tensors on this device: `rows_triton` or `rows_torch`."""
    if not uses_triton(device):
        return rows_torch
    from . import rows_triton  # on first use: a CPU needs no triton

    return rows_triton
