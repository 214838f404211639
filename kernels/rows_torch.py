"""The row functions of `rows.py` in plain torch, for machines without a GPU. Shape letters as there, b one block."""

import torch
from torch import Tensor

from .chunks import slices
from .rows import Statistics

BLOCK = 2048  # divides chunks.TILE_COLUMNS; a block of a chunk stays in a core's cache between its passes


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real: Tensor, first: int) -> None:
    padding_B = torch.arange(first, first + z_CB.shape[1], device=z_CB.device) >= real
    for block in slices(z_CB.shape[1], BLOCK):
        top_C, total_C, spread_C = folded_4C[:3].clone()
        gap_Cb = z_CB[:, block].masked_fill(padding_B[block], float("-inf"))
        new_top_C = torch.maximum(top_C, gap_Cb.amax(dim=1))
        shift_C = top_C - new_top_C
        scale_C = shift_C.exp()
        gap_Cb -= new_top_C[:, None]
        mass_Cb = gap_Cb.exp()
        folded_4C[0] = new_top_C
        folded_4C[1] = total_C * scale_C + mass_Cb.sum(dim=1)
        new_spread_C = gap_Cb.mul_(mass_Cb).masked_fill_(padding_B[block], 0.0).sum(dim=1)
        folded_4C[2] = (spread_C + shift_C * total_C) * scale_C + new_spread_C
    column_C, owned_C = _target_column(target_C, z_CB, real, first)
    folded_4C[3] = torch.where(owned_C, z_CB.gather(1, column_C[:, None])[:, 0], folded_4C[3])


def dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    target_C: Tensor,
    real: Tensor,
    statistics: Statistics,
    d_logp_C: Tensor,
    d_entropy_C: Tensor | None,
) -> None:
    assert dz_CU.data_ptr() == z_CU.data_ptr() and dz_CU.dtype == z_CU.dtype
    padding_U = torch.arange(z_CU.shape[1], device=z_CU.device) >= real
    for block in slices(z_CU.shape[1], BLOCK):
        logp_Cb = (z_CU[:, block] - statistics.top_C[:, None]).sub_(statistics.log_total_C[:, None])
        p_Cb = logp_Cb.exp()
        dz_Cb = -d_logp_C[:, None] * p_Cb
        if d_entropy_C is not None:
            dz_Cb -= d_entropy_C[:, None] * p_Cb * (logp_Cb + statistics.entropy_C[:, None])
        dz_CU[:, block] = dz_Cb.masked_fill_(padding_U[block], 0.0)
    column_C, owned_C = _target_column(target_C, z_CU, real, 0)
    dz_CU.scatter_add_(1, column_C[:, None], torch.where(owned_C, d_logp_C, 0.0)[:, None])


def _target_column(target_C: Tensor, z_CB: Tensor, real: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The target's column in this tile, clamped into it, and whether it is really there."""
    columns = z_CB.shape[1]
    owned_C = (target_C >= first) & (target_C < first + columns) & (target_C < real)
    return (target_C - first).clamp(0, columns - 1), owned_C
