"""The row functions of `rows.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there,
and L running lanes of a thread's P neighbouring columns.

Why: torch would read the logits once per operation; here they are read once (fold), or read and written once (dlogits),
which is what bounds both kernels. The matmuls stay with cuBLAS. So that the kernels keep up with the memory: blocks of
real columns alone carry no mask and load 128 bits at a time; column numbers are 32-bit; fold keeps running statistics
in each lane and reduces over lanes once per segment, with no barrier between; exponentials are 2^(x log2 e), which the
hardware has. `benchmarks/aot.py` counts what a logit costs.

All arithmetic is in the dtype of the statistics; loads are cast to it at once, since the interpreter
(TRITON_INTERPRET=1) gets bf16 arithmetic and fp32→bf16 rounding wrong. The same functions in plain torch:
`rows_torch.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import TILE_COLUMNS
from .softmax import EMPTY, SoftmaxStatistics

BLOCK = 2048  # divides SEGMENT
SEGMENT = TILE_COLUMNS  # columns after which fold reduces over lanes: tiled and resident folds then agree to the bit
LANE = 4  # P: neighbouring columns of one thread that share their running statistics, 128 bits in fp32
WARPS = 8

# Triton reads module constants only as constexpr.
_EMPTY = tl.constexpr(EMPTY)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x as the hardware has it: 2^(x log2 e)."""
    return tl.exp2(x * tl.full((), _LOG2E, x.dtype))


@triton.jit
def _fold_lanes(lane_max, lane_sum, gap_sum, x_LP, is_real_LP, MASKED: tl.constexpr):
    """Online softmax in each lane: (max, sum, gap sum) [L] after one more block. MASKED: columns that are not real,
    with x = EMPTY, add nothing."""
    new_max = tl.maximum(lane_max, tl.max(x_LP, 1))
    shift = lane_max - new_max
    scale = exp(shift)
    gap_LP = x_LP - new_max[:, None]
    exp_gap_LP = exp(gap_LP)
    if MASKED:
        exp_gap_LP = tl.where(is_real_LP, exp_gap_LP, tl.cast(0.0, x_LP.dtype))
    gap_sum = (gap_sum + shift * lane_sum) * scale + tl.sum(gap_LP * exp_gap_LP, 1)
    return new_max, lane_sum * scale + tl.sum(exp_gap_LP, 1), gap_sum


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
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """Online softmax of one tile: `rows_torch.fold_`."""
    row = tl.program_id(0).to(tl.int64)
    Acc = FOLDED.dtype.element_ty
    LANES: tl.constexpr = BLOCK // LANE
    FOLDED += row
    Z += row * z_stride
    real_columns = tl.maximum(tl.minimum(tl.load(REAL_COLUMNS) - first, columns), 0).to(tl.int32)
    row_max = tl.load(FOLDED)
    row_sum = tl.load(FOLDED + folded_stride)
    gap_sum = tl.load(FOLDED + 2 * folded_stride)
    offset = tl.arange(0, BLOCK)
    for segment in range(0, real_columns, SEGMENT):
        end = tl.minimum(segment + SEGMENT, real_columns)
        whole = segment + (end - segment) // BLOCK * BLOCK
        max_L = tl.full((LANES,), _EMPTY, Acc)
        sum_L = tl.zeros((LANES,), Acc)
        gap_sum_L = tl.zeros((LANES,), Acc)
        for start in range(segment, whole, BLOCK):
            x_LP = tl.load(Z + start + offset).to(Acc).reshape(LANES, LANE)
            max_L, sum_L, gap_sum_L = _fold_lanes(max_L, sum_L, gap_sum_L, x_LP, x_LP, False)
        if whole < end:
            is_real = whole + offset < end
            x = tl.load(Z + whole + offset, mask=is_real, other=0.0).to(Acc)
            x_LP = tl.where(is_real, x, tl.full((), _EMPTY, Acc)).reshape(LANES, LANE)
            is_real_LP = is_real.reshape(LANES, LANE)
            max_L, sum_L, gap_sum_L = _fold_lanes(max_L, sum_L, gap_sum_L, x_LP, is_real_LP, True)
        new_max = tl.maximum(row_max, tl.max(max_L, 0))
        shift_L = max_L - new_max
        scale_L = exp(shift_L)
        shift = row_max - new_max
        scale = exp(shift)
        gap_sum = (gap_sum + shift * row_sum) * scale + tl.sum((gap_sum_L + shift_L * sum_L) * scale_L, 0)
        row_sum = row_sum * scale + tl.sum(sum_L * scale_L, 0)
        row_max = new_max
    tl.store(FOLDED, row_max)
    tl.store(FOLDED + folded_stride, row_sum)
    tl.store(FOLDED + 2 * folded_stride, gap_sum)
    target = tl.load(TARGET + row) - first
    in_tile = (target >= 0) & (target < real_columns)
    tl.store(FOLDED + 3 * folded_stride, tl.load(Z + target, mask=in_tile, other=0.0).to(Acc), mask=in_tile)


@triton.jit
def _dlogits(x, row_max, log_sum, d_logp, entropy, d_entropy, IS_TARGET: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """d_logp (1[x is the target] − p) − d_entropy p (log p + entropy)."""
    gap = x - row_max
    log2e = tl.full((), _LOG2E, x.dtype)
    p = tl.exp2(gap * log2e - log_sum * log2e)
    dz = d_logp * (tl.cast(1.0, x.dtype) - p) if IS_TARGET else -d_logp * p
    if HAS_ENTROPY:
        dz -= d_entropy * p * ((gap - log_sum) + entropy)
    return dz


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
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns).to(tl.int32)
    row_max = tl.load(MAX + row)
    log_sum = tl.load(LOG_SUM + row)
    d_logp = tl.load(D_LOGP + row)
    entropy = d_logp
    d_entropy = d_logp
    if HAS_ENTROPY:
        entropy = tl.load(ENTROPY + row)
        d_entropy = tl.load(D_ENTROPY + row)
    target = tl.load(TARGET + row)
    is_here = (target >= 0) & (target < real_columns)
    x_target = tl.load(Z + target, mask=is_here, other=0.0).to(Acc)  # before it is overwritten
    offset = tl.arange(0, BLOCK)
    whole = real_columns // BLOCK * BLOCK
    # A narrower DZ lies over the block just read and blocks read before it, never over a later one: once every warp of
    # a block has its x in registers, the block may be written.
    for start in range(0, whole, BLOCK):
        x = tl.load(Z + start + offset).to(Acc)
        tl.debug_barrier()
        dz = _dlogits(x, row_max, log_sum, d_logp, entropy, d_entropy, False, HAS_ENTROPY)
        tl.store(DZ + start + offset, dz.to(DZ.dtype.element_ty))
    for start in range(whole, columns, BLOCK):
        column = start + offset
        is_real = column < real_columns
        x = tl.load(Z + column, mask=is_real, other=-float("inf")).to(Acc)
        tl.debug_barrier()
        dz = _dlogits(x, row_max, log_sum, d_logp, entropy, d_entropy, False, HAS_ENTROPY)
        tl.store(DZ + column, tl.where(is_real, dz, tl.cast(0.0, Acc)).to(DZ.dtype.element_ty), mask=column < columns)
    tl.debug_barrier()
    dz = _dlogits(x_target, row_max, log_sum, d_logp, entropy, d_entropy, True, HAS_ENTROPY)
    tl.store(DZ + target, dz.to(DZ.dtype.element_ty), mask=is_here)


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real_columns: Tensor, first: int) -> None:
    assert z_CB.stride(1) == 1 and folded_4C.stride(1) == 1 and target_C.is_contiguous()
    strides = (folded_4C.stride(0), z_CB.stride(0))
    tensors = (folded_4C, z_CB, target_C, real_columns)
    launch(fold_kernel, z_CB, *tensors, *strides, first, z_CB.shape[1], SEGMENT=SEGMENT, LANE=LANE)


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
