"""The row functions of `rows.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there.

Why: torch would read the logits once per operation; here they are read once (fold), or read and written once (dlogits),
which is what bounds both kernels. The matmuls stay with cuBLAS. All arithmetic is in the dtype of the statistics; loads
are cast to it at once, since the interpreter (TRITON_INTERPRET=1) gets bf16 arithmetic and fp32→bf16 rounding wrong.
The same functions in plain torch: `rows_torch.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import SoftmaxStatistics

BLOCK = 2048  # divides chunks.TILE_COLUMNS
WARPS = 8


@triton.jit
def fold_kernel(
    FOLDED,  # [4, C] Acc, row stride folded_stride: max, sum, gap sum, target (`softmax.py`); read and written
    Z,  # [C, B] Acc or bf16, row stride z_stride
    TARGET,  # [C] int64, column within the rank's rows
    REAL_COLUMNS,  # [] int64, columns of the rank that are no padding
    folded_stride,
    z_stride,
    first,
    columns,
    BLOCK: tl.constexpr,
):
    """Online softmax of one tile: `rows_torch.fold_`."""
    row = tl.program_id(0).to(tl.int64)
    Acc = FOLDED.dtype.element_ty
    FOLDED += row
    Z += row * z_stride
    real_columns = tl.minimum(tl.load(REAL_COLUMNS) - first, columns)
    row_max = tl.load(FOLDED)
    row_sum = tl.load(FOLDED + folded_stride)
    gap_sum = tl.load(FOLDED + 2 * folded_stride)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_real = column < real_columns
        x = tl.load(Z + column, mask=is_real, other=-float("inf")).to(Acc)
        new_max = tl.maximum(row_max, tl.max(x, 0))
        shift = row_max - new_max
        scale = tl.exp(shift)
        gap = x - new_max
        exp_gap = tl.exp(gap)
        gap_sum = (gap_sum + shift * row_sum) * scale + tl.sum(tl.where(is_real, gap * exp_gap, tl.cast(0.0, Acc)), 0)
        row_sum = row_sum * scale + tl.sum(exp_gap, 0)
        row_max = new_max
    tl.store(FOLDED, row_max)
    tl.store(FOLDED + folded_stride, row_sum)
    tl.store(FOLDED + 2 * folded_stride, gap_sum)
    target = tl.load(TARGET + row) - first
    in_tile = (target >= 0) & (target < real_columns)
    tl.store(FOLDED + 3 * folded_stride, tl.load(Z + target, mask=in_tile, other=0.0).to(Acc), mask=in_tile)


@triton.jit
def dlogits_kernel(
    DZ,  # [C, U] Acc or bf16, row stride dz_stride; written; may alias Z, each row starting at the same byte
    Z,  # [C, U] Acc or bf16, row stride z_stride
    TARGET,  # [C] int64, column within the rank's rows
    REAL_COLUMNS,  # [] int64, columns of the rank that are no padding
    MAX,  # [C] Acc, statistics over all ranks
    LOG_SUM,  # [C] Acc, likewise
    D_LOGP,  # [C] Acc, upstream gradient of the log-prob
    ENTROPY,  # [C] Acc, read only if HAS_ENTROPY
    D_ENTROPY,  # [C] Acc, upstream gradient of the entropy, read only if HAS_ENTROPY
    dz_stride,
    z_stride,
    columns,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the logits, over the logits: `rows_torch.dlogits_`."""
    row = tl.program_id(0).to(tl.int64)
    Acc = MAX.dtype.element_ty
    Z += row * z_stride
    DZ += row * dz_stride
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns)
    target = tl.load(TARGET + row)
    row_max = tl.load(MAX + row)
    log_sum = tl.load(LOG_SUM + row)
    d_logp = tl.load(D_LOGP + row)
    zero = tl.cast(0.0, Acc)
    one = tl.cast(1.0, Acc)
    entropy = zero
    d_entropy = zero
    if HAS_ENTROPY:
        entropy = tl.load(ENTROPY + row)
        d_entropy = tl.load(D_ENTROPY + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_real = column < real_columns
        x = tl.load(Z + column, mask=is_real, other=-float("inf")).to(Acc)
        # A narrower DZ lies over the block just read and blocks read before it, never over a later one: once every
        # warp of this block has its x in registers, the block may be written.
        tl.debug_barrier()
        logp = (x - row_max) - log_sum
        p = tl.exp(logp)
        dz = d_logp * (tl.where(column == target, one, zero) - p)
        if HAS_ENTROPY:
            dz -= d_entropy * p * (logp + entropy)
        tl.store(DZ + column, tl.where(is_real, dz, zero).to(DZ.dtype.element_ty), mask=column < columns)


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real_columns: Tensor, first: int) -> None:
    assert z_CB.stride(1) == 1 and folded_4C.stride(1) == 1 and target_C.is_contiguous()
    strides = (folded_4C.stride(0), z_CB.stride(0))
    launch(fold_kernel, z_CB, folded_4C, z_CB, target_C, real_columns, *strides, first, z_CB.shape[1])


def dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    target_C: Tensor,
    real_columns: Tensor,
    statistics: SoftmaxStatistics,
    d_logp_C: Tensor,
    d_entropy_C: Tensor | None,
) -> None:
    assert dz_CU.stride(1) == z_CU.stride(1) == 1
    softmax = (statistics.max_C, statistics.log_sum_C)
    entropy = (statistics.entropy_C, d_logp_C if d_entropy_C is None else d_entropy_C)
    assert all(x.is_contiguous() for x in (target_C, *softmax, d_logp_C, statistics.entropy_C))
    tensors = (dz_CU, z_CU, target_C, real_columns, *softmax, d_logp_C, *entropy)
    sizes = (dz_CU.stride(0), z_CU.stride(0), z_CU.shape[1])
    launch(dlogits_kernel, z_CU, *tensors, *sizes, HAS_ENTROPY=d_entropy_C is not None)


def launch(kernel: Any, z_CB: Tensor, *arguments: Tensor | int, **constants: object) -> None:
    """Runs one program per row of z_CB, on its device: Triton launches on the current one, which may be another."""
    if len(z_CB):
        with torch.cuda.device(z_CB.device if z_CB.is_cuda else -1):  # -1: does nothing
            kernel[(len(z_CB),)](*arguments, **constants, BLOCK=BLOCK, num_warps=WARPS)
