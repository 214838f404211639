"""The row functions of `rows.py` in plain torch, for machines without a GPU.

Shape letters as there, b columns of a block, c tokens of a thread. The
Triton kernels of the same functions: `rows_triton.py`.
"""

import torch
from torch import Tensor

from .chunks import slices
from .softmax import SoftmaxStatistics
from .threads import in_threads, pieces

BLOCK = 2048  # divides chunks.TILE_COLUMNS; 384 tokens of a block (3 MiB) stay in the caches between their passes


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real_columns: Tensor, first: int) -> None:
    def fold(part: slice) -> None:
        for block in slices(z_CB.shape[1], BLOCK):
            _fold_block(folded_4C[:, part], z_CB[part, block], target_C[part], real_columns, first + block.start)

    in_threads(fold, pieces(target_C, z_CB.shape[1]))


def exponentiate_(exp_Cb: Tensor, z_Cb: Tensor, max_C: Tensor, real_columns: Tensor, first: int) -> tuple[Tensor, ...]:
    """(max, sum, gap sum) of one tile alone, with max at least `max_C`. Writes e^(x − max) to exp_Cb, exactly 0 in
    padding, and overwrites z_Cb."""
    columns = _count_real_columns(z_Cb, real_columns, first)
    exp_Cb[:, columns:] = 0.0
    return _sums(z_Cb[:, :columns], max_C, gap_Cb=z_Cb[:, :columns], exp_Cb=exp_Cb[:, :columns])


def _fold_block(folded_4C: Tensor, z_Cb: Tensor, target_C: Tensor, real_columns: Tensor, first: int) -> None:
    column_C, in_tile_C = target_column(target_C, z_Cb.shape[1], real_columns, first)
    folded_4C[3] = torch.where(in_tile_C, z_Cb.gather(1, column_C[:, None])[:, 0], folded_4C[3])
    max_C, sum_C, gap_sum_C = folded_4C[:3].clone()
    new_max_C, block_sum_C, block_gap_sum_C = _sums(z_Cb[:, : _count_real_columns(z_Cb, real_columns, first)], max_C)
    shift_C = max_C - new_max_C
    scale_C = shift_C.exp()
    folded_4C[0] = new_max_C
    folded_4C[1] = sum_C * scale_C + block_sum_C
    folded_4C[2] = (gap_sum_C + shift_C * sum_C) * scale_C + block_gap_sum_C


def _sums(
    z_Cb: Tensor, max_C: Tensor, gap_Cb: Tensor | None = None, exp_Cb: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum, gap sum) of these columns, with max at least `max_C`. gap_Cb and exp_Cb are buffers for x − max (z_Cb
    itself will do) and e^(x − max)."""
    if z_Cb.shape[1] == 0:
        return max_C, torch.zeros_like(max_C), torch.zeros_like(max_C)
    max_C = torch.maximum(max_C, z_Cb.amax(dim=1))
    gap_Cb = torch.sub(z_Cb, max_C[:, None], out=gap_Cb)
    exp_Cb = torch.exp(gap_Cb, out=exp_Cb)
    return max_C, exp_Cb.sum(dim=1), gap_Cb.mul_(exp_Cb).sum(dim=1)


def _count_real_columns(z_CB: Tensor, real_columns: Tensor, first: int) -> int:
    """The number of columns of this tile that are no padding. (On a CPU a 0-dim tensor is read without waiting.)"""
    return min(max(int(real_columns) - first, 0), z_CB.shape[1])


def dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    target_C: Tensor,
    real_columns: Tensor,
    statistics: SoftmaxStatistics,
    d_logp_C: Tensor,
    d_entropy_C: Tensor | None,
) -> None:
    assert dz_CU.data_ptr() == z_CU.data_ptr() and dz_CU.dtype == z_CU.dtype
    padding_U = torch.arange(z_CU.shape[1], device=z_CU.device) >= real_columns

    def overwrite(part: slice) -> None:
        max_c1, log_sum_c1, entropy_c1 = (
            x[part, None] for x in (statistics.max_C, statistics.log_sum_C, statistics.entropy_C)
        )
        for block in slices(z_CU.shape[1], BLOCK):
            logp_cb = (z_CU[part, block] - max_c1).sub_(log_sum_c1)
            p_cb = logp_cb.exp()
            dz_cb = -d_logp_C[part, None] * p_cb
            if d_entropy_C is not None:
                dz_cb -= d_entropy_C[part, None] * p_cb * (logp_cb + entropy_c1)
            dz_CU[part, block] = dz_cb.masked_fill_(padding_U[block], 0.0)

    in_threads(overwrite, pieces(target_C, z_CU.shape[1]))
    column_C, in_tile_C = target_column(target_C, z_CU.shape[1], real_columns, 0)
    dz_CU.scatter_add_(1, column_C[:, None], torch.where(in_tile_C, d_logp_C, 0.0)[:, None])


def target_column(target_C: Tensor, columns: int, real_columns: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(column of the target in this tile, clamped into it; True where the target lies in the tile)."""
    in_tile_C = (target_C >= first) & (target_C < first + columns) & (target_C < real_columns)
    return (target_C - first).clamp(0, columns - 1), in_tile_C
