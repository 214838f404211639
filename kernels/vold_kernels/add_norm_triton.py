"""A residual's sum and its RMSNorm in one Triton kernel forward and one backward (`add_norm.py` has the formulas).

Shape letters: T rows, D their width, which is one block. The backward kernel's programs take ROWS rows each, keep their
part of the weight's gradient in registers and load the next row while they work on this one; several programs share an
SM, so that its memory is never idle. (One program an SM that loads nothing ahead, as in liger-kernel, is bound by the
memory's latency.) Loads are cast to the compute type at once and rounded where separate operations round: after the
sum, after the norm, after its weight.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of a program of the backward kernel
ELEMENTS = 8  # of a row in one thread: 128 bits of bf16


@triton.jit
def add_norm_forward_kernel(
    TOTAL,  # [T, D] x + residual, written only if HAS_RESIDUAL
    Y,  # [T, D] its norm, written
    SCALE,  # [T] Acc: 1 / rms, written
    X,  # [T, D] fp32, bf16, contiguous like all
    RESIDUAL,  # [T, D], read only if HAS_RESIDUAL
    WEIGHT,  # [D]
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`add_norm.add_rms_norm` of one row."""
    row = tl.program_id(0).to(tl.int64)
    Acc: tl.constexpr = SCALE.dtype.element_ty
    Type: tl.constexpr = Y.dtype.element_ty
    column = tl.arange(0, BLOCK)
    mask = column < D
    offsets = row * D + column
    x = tl.load(X + offsets, mask=mask, other=0.0).to(Acc)
    weight = tl.load(WEIGHT + column, mask=mask, other=0.0).to(Acc)
    if HAS_RESIDUAL:
        x = (x + tl.load(RESIDUAL + offsets, mask=mask, other=0.0).to(Acc)).to(Type).to(Acc)
        tl.store(TOTAL + offsets, x.to(Type), mask=mask)
    scale = tl.rsqrt(tl.sum(x * x, 0) / tl.cast(D, Acc) + tl.cast(EPS, Acc))
    tl.store(SCALE + row, scale)
    tl.store(Y + offsets, ((x * scale).to(Type).to(Acc) * weight).to(Type), mask=mask)


@triton.jit
def _row(D_Y, D_TOTAL, TOTAL, offsets, mask, HAS_D_TOTAL: tl.constexpr):
    d_y = tl.load(D_Y + offsets, mask=mask, other=0.0)
    x = tl.load(TOTAL + offsets, mask=mask, other=0.0)
    d_total = d_y
    if HAS_D_TOTAL:
        d_total = tl.load(D_TOTAL + offsets, mask=mask, other=0.0)
    return d_y, x, d_total


@triton.jit
def add_norm_backward_kernel(
    D_X,  # [T, D], written: the gradient of x and of the residual
    D_WEIGHT,  # [programs, D] Acc: each program's part, written
    D_Y,  # [T, D]
    D_TOTAL,  # [T, D], read only if HAS_D_TOTAL
    TOTAL,  # [T, D]
    SCALE,  # [T] Acc
    WEIGHT,  # [D]
    rows,
    HAS_D_TOTAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_x = d_total + (m − x̂ mean(m x̂)) / rms,  m = d_y weight,  x̂ = total / rms;  d_weight = Σ d_y x̂."""
    program = tl.program_id(0).to(tl.int64)
    Acc: tl.constexpr = SCALE.dtype.element_ty
    Type: tl.constexpr = D_X.dtype.element_ty
    column = tl.arange(0, BLOCK)
    mask = column < D
    weight = tl.load(WEIGHT + column, mask=mask, other=0.0).to(Acc)
    d_weight = tl.zeros((BLOCK,), Acc)
    begin = program * ROWS
    end = tl.minimum(begin + ROWS, rows)
    next_d_y, next_x, next_d_total = _row(D_Y, D_TOTAL, TOTAL, begin * D + column, mask, HAS_D_TOTAL)
    next_scale = tl.load(SCALE + begin)
    for row in range(begin, end):
        d_y = next_d_y.to(Acc)
        x = next_x.to(Acc)
        d_total = next_d_total.to(Acc)
        scale = next_scale
        ahead = tl.minimum(row + 1, end - 1)
        next_d_y, next_x, next_d_total = _row(D_Y, D_TOTAL, TOTAL, ahead * D + column, mask, HAS_D_TOTAL)
        next_scale = tl.load(SCALE + ahead)
        m = d_y * weight
        d_weight += d_y * (x * scale).to(Type).to(Acc)
        pull = scale * scale * tl.sum(m * x, 0) / tl.cast(D, Acc)
        d_x = scale * (m - pull * x)
        if HAS_D_TOTAL:
            d_x += d_total
        tl.store(D_X + row * D + column, d_x.to(Type), mask=mask)
    tl.store(D_WEIGHT + program * D + column, d_weight, mask=mask)


@cache
def block(width: int) -> tuple[int, int]:
    """(columns of a block, warps) for rows of this width."""
    columns = int(triton.next_power_of_2(width))
    return columns, min(max(columns // (32 * ELEMENTS), 1), 16)


def forward_(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], **options) -> None:
    """outputs: total, y, scale; inputs: x, residual, weight. Rows are all dimensions but the last."""
    weight_D = inputs[-1]
    columns, warps = block(weight_D.shape[0])
    with torch.cuda.device(weight_D.device if weight_D.is_cuda else -1):  # -1: does nothing
        add_norm_forward_kernel[(outputs[2].numel(),)](
            *outputs,
            *inputs,
            **options,
            D=weight_D.shape[0],
            BLOCK=columns,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )


def backward_(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], **options) -> None:
    """outputs: d_x, parts of d_weight; inputs: d_y, d_total, total, scale, weight."""
    scale, weight_D = inputs[-2:]
    columns, warps = block(weight_D.shape[0])
    with torch.cuda.device(weight_D.device if weight_D.is_cuda else -1):
        add_norm_backward_kernel[(outputs[1].shape[0],)](
            *outputs,
            *inputs,
            scale.numel(),  # pyright: ignore[reportCallIssue]
            **options,
            D=weight_D.shape[0],
            BLOCK=columns,
            ROWS=ROWS,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )
