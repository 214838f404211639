"""The row functions of `rows.py` in plain torch, for machines without a GPU. Shape letters as there, b one block."""

import torch
from torch import Tensor

from .chunks import slices
from .rows import Statistics

BLOCK = 2048  # divides chunks.TILE_COLUMNS; 384 tokens of a block (3 MiB) stay in the caches between their passes


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real: Tensor, first: int) -> None:
    for block in slices(z_CB.shape[1], BLOCK):
        _fold_block(folded_4C, z_CB[:, block], target_C, real, first + block.start)


def exponentiate_(mass_Cb: Tensor, z_Cb: Tensor, top_C: Tensor, real: Tensor, first: int) -> tuple[Tensor, ...]:
    """(top, total, spread) of one tile alone, top no less than `top_C`, as e^(x − top) is written to mass_Cb, exactly 0
    in padding. Spends z_Cb."""
    columns = _real_columns(z_Cb, real, first)
    mass_Cb[:, columns:] = 0.0
    return _sums(z_Cb[:, :columns], top_C, gap_Cb=z_Cb[:, :columns], mass_Cb=mass_Cb[:, :columns])


def _fold_block(folded_4C: Tensor, z_Cb: Tensor, target_C: Tensor, real: Tensor, first: int) -> None:
    column_C, owned_C = target_column(target_C, z_Cb.shape[1], real, first)
    folded_4C[3] = torch.where(owned_C, z_Cb.gather(1, column_C[:, None])[:, 0], folded_4C[3])
    top_C, total_C, spread_C = folded_4C[:3].clone()
    new_top_C, more_C, more_spread_C = _sums(z_Cb[:, : _real_columns(z_Cb, real, first)], top_C)
    shift_C = top_C - new_top_C
    scale_C = shift_C.exp()
    folded_4C[0] = new_top_C
    folded_4C[1] = total_C * scale_C + more_C
    folded_4C[2] = (spread_C + shift_C * total_C) * scale_C + more_spread_C


def _sums(
    z_Cb: Tensor, top_C: Tensor, gap_Cb: Tensor | None = None, mass_Cb: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(top, total, spread) of these columns. gap_Cb, mass_Cb: room for x − top (z_Cb itself will do), e^(x − top)."""
    if z_Cb.shape[1] == 0:
        return top_C, torch.zeros_like(top_C), torch.zeros_like(top_C)
    top_C = torch.maximum(top_C, z_Cb.amax(dim=1))
    gap_Cb = torch.sub(z_Cb, top_C[:, None], out=gap_Cb)
    mass_Cb = torch.exp(gap_Cb, out=mass_Cb)
    return top_C, mass_Cb.sum(dim=1), gap_Cb.mul_(mass_Cb).sum(dim=1)


def _real_columns(z_CB: Tensor, real: Tensor, first: int) -> int:
    """How many columns of this tile are no padding. (On a CPU a 0-dim tensor is read without waiting.)"""
    return min(max(int(real) - first, 0), z_CB.shape[1])


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
    column_C, owned_C = target_column(target_C, z_CU.shape[1], real, 0)
    dz_CU.scatter_add_(1, column_C[:, None], torch.where(owned_C, d_logp_C, 0.0)[:, None])


def target_column(target_C: Tensor, columns: int, real: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The target's column in this tile, clamped into it, and whether it is really there."""
    owned_C = (target_C >= first) & (target_C < first + columns) & (target_C < real)
    return (target_C - first).clamp(0, columns - 1), owned_C
