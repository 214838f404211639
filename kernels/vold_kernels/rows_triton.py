"""The row functions of `rows.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there.

The matmuls stay with cuBLAS; these kernels are bound by the one read (fold) or the read and the write (dlogits) of the
logits. All arithmetic is in the dtype of the statistics; loads are cast to it at once, since the interpreter
(TRITON_INTERPRET=1) gets bf16 arithmetic and fp32→bf16 rounding wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Statistics

BLOCK = 2048  # divides chunks.TILE_COLUMNS
WARPS = 8


@triton.jit
def fold_kernel(
    FOLDED,  # [4, C] Acc, row stride folded_stride: top, total, spread, target; read and written
    Z,  # [C, B] Acc or bf16, row stride z_stride
    TARGET,  # [C] int64, column within the rank's rows
    REAL,  # [] int64, real columns of the rank
    folded_stride,
    z_stride,
    first,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Acc = FOLDED.dtype.element_ty
    FOLDED += row
    Z += row * z_stride
    real = tl.minimum(tl.load(REAL) - first, columns)
    top = tl.load(FOLDED)
    total = tl.load(FOLDED + folded_stride)
    spread = tl.load(FOLDED + 2 * folded_stride)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < real
        x = tl.load(Z + column, mask=here, other=-float("inf")).to(Acc)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = top - new_top
        scale = tl.exp(shift)
        gap = x - new_top
        mass = tl.exp(gap)
        spread = (spread + shift * total) * scale + tl.sum(tl.where(here, gap * mass, tl.cast(0.0, Acc)), 0)
        total = total * scale + tl.sum(mass, 0)
        top = new_top
    tl.store(FOLDED, top)
    tl.store(FOLDED + folded_stride, total)
    tl.store(FOLDED + 2 * folded_stride, spread)
    target = tl.load(TARGET + row) - first
    owned = (target >= 0) & (target < real)
    tl.store(FOLDED + 3 * folded_stride, tl.load(Z + target, mask=owned, other=0.0).to(Acc), mask=owned)


@triton.jit
def dlogits_kernel(
    DZ,  # [C, U] Acc or bf16, row stride dz_stride; may alias Z, each row from the same byte on
    Z,  # [C, U] Acc or bf16, row stride z_stride
    TARGET,  # [C] int64, column within the rank's rows
    REAL,  # [] int64, real columns of the rank
    TOP,  # [C] Acc
    LOG_TOTAL,  # [C] Acc
    D_LOGP,  # [C] Acc
    ENTROPY,  # [C] Acc, read only if HAS_ENTROPY
    D_ENTROPY,  # [C] Acc, read only if HAS_ENTROPY
    dz_stride,
    z_stride,
    columns,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Acc = TOP.dtype.element_ty
    Z += row * z_stride
    DZ += row * dz_stride
    real = tl.minimum(tl.load(REAL), columns)
    target = tl.load(TARGET + row)
    top = tl.load(TOP + row)
    log_total = tl.load(LOG_TOTAL + row)
    d_logp = tl.load(D_LOGP + row)
    zero = tl.cast(0.0, Acc)
    one = tl.cast(1.0, Acc)
    if HAS_ENTROPY:
        entropy = tl.load(ENTROPY + row)
        d_entropy = tl.load(D_ENTROPY + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < real
        x = tl.load(Z + column, mask=here, other=-float("inf")).to(Acc)
        # A narrower DZ lies over the block just read and blocks read before it, never over a later one: once every
        # warp of this block has its x in registers, the block may be written.
        tl.debug_barrier()
        logp = (x - top) - log_total
        p = tl.exp(logp)
        dz = d_logp * (tl.where(column == target, one, zero) - p)
        if HAS_ENTROPY:
            dz -= d_entropy * p * (logp + entropy)
        tl.store(DZ + column, tl.where(here, dz, zero).to(DZ.dtype.element_ty), mask=column < columns)


def fold_(folded_4C: Tensor, z_CB: Tensor, target_C: Tensor, real: Tensor, first: int) -> None:
    tokens, columns = z_CB.shape
    assert z_CB.stride(1) == 1 and folded_4C.stride(1) == 1 and target_C.is_contiguous()
    if tokens:
        with _on(z_CB):
            fold_kernel[(tokens,)](
                folded_4C,
                z_CB,
                target_C,
                real,
                folded_4C.stride(0),
                z_CB.stride(0),
                first,
                columns,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    target_C: Tensor,
    real: Tensor,
    statistics: Statistics,
    d_logp_C: Tensor,
    d_entropy_C: Tensor | None,
) -> None:
    tokens, columns = z_CU.shape
    assert dz_CU.stride(1) == z_CU.stride(1) == 1
    per_token = (target_C, statistics.top_C, statistics.log_total_C, d_logp_C, statistics.entropy_C)
    assert all(x.is_contiguous() for x in per_token)
    if tokens:
        with _on(z_CU):
            dlogits_kernel[(tokens,)](
                dz_CU,
                z_CU,
                target_C,
                real,
                statistics.top_C,
                statistics.log_total_C,
                d_logp_C,
                statistics.entropy_C,
                d_logp_C if d_entropy_C is None else d_entropy_C,
                dz_CU.stride(0),
                z_CU.stride(0),
                columns,
                HAS_ENTROPY=d_entropy_C is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def _on(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's. (On the CPU: does nothing.)"""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
