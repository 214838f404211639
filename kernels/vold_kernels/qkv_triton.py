"""Queries, keys and values of a layer out of its joint projection, in one Triton kernel forward and one backward: norms
of the heads, rotary embedding, and keys and values laid where attention reads them (`qkv.py` has the formulas).

Shape letters: T tokens, S keys that attention reads, A query heads, K key/value heads, H head width, W = (A + 2K) H
columns of the projection: for each key head its A/K query heads, its key, its value. A program has all heads of a token
as one tile [heads, H/2] for each half of a head, since the rotary embedding pairs column h with h + H/2. A token that
several segments share (a prompt) has several places among the S keys; their gradients add up in the order of places.

Why: as torch's and Liger's operations these are three copies, two norms, a rotation in place and two gathers, each a
pass over the memory; here one read and one write. Loads are cast to the compute type at once and rounded where the
separate operations round (after the norm, after its weight, and the angles), see `rows_triton.py` on the interpreter.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # tokens of a program of the backward kernel, whose weight gradients stay in its registers
ELEMENTS = 8  # of a tile's half in one thread: 128 bits of bf16


@triton.jit
def _halves(POINTER, offsets, mask, HALF: tl.constexpr, Acc: tl.constexpr):
    first = tl.load(POINTER + offsets, mask=mask, other=0.0).to(Acc)
    return first, tl.load(POINTER + offsets + HALF, mask=mask, other=0.0).to(Acc)


@triton.jit
def _store_halves(POINTER, offsets, first, second, mask, HALF: tl.constexpr):
    tl.store(POINTER + offsets, first.to(POINTER.dtype.element_ty), mask=mask)
    tl.store(POINTER + offsets + HALF, second.to(POINTER.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x, Type: tl.constexpr, Acc: tl.constexpr):
    return x.to(Type).to(Acc)


@triton.jit
def _normed(first, second, WEIGHT, h, mask_h, EPS: tl.constexpr, H: tl.constexpr, Type: tl.constexpr):
    """(halves of x / rms, rounded and times the weight; 1 / rms; halves of x / rms; halves of the weight)."""
    Acc: tl.constexpr = first.dtype
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / tl.cast(H, Acc)
    scale = tl.rsqrt(mean + tl.cast(EPS, Acc))[:, None]
    weight_first, weight_second = _halves(WEIGHT, h, mask_h, H // 2, Acc)
    unit_first = _rounded(first * scale, Type, Acc)
    unit_second = _rounded(second * scale, Type, Acc)
    out_first = _rounded(unit_first * weight_first, Type, Acc)
    out_second = _rounded(unit_second * weight_second, Type, Acc)
    return out_first, out_second, scale, unit_first, unit_second, weight_first, weight_second


@triton.jit
def _turned(POINTER, offsets, mask, WEIGHT, h, mask_h, cos, sin, EPS: tl.constexpr, H: tl.constexpr):
    """Halves of heads after their norm (EPS None: they have none) and the rotary embedding."""
    Acc: tl.constexpr = cos.dtype
    first, second = _halves(POINTER, offsets, mask, H // 2, Acc)  # pyright: ignore[reportGeneralTypeIssues]
    if EPS is not None:
        first, second, _, _, _, _, _ = _normed(first, second, WEIGHT, h, mask_h, EPS, H, POINTER.dtype.element_ty)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _angles(COS, SIN, row, h, mask_h, H: tl.constexpr, Type: tl.constexpr):
    """Cosines and sines of the first half of a head, which are those of the second, as the layer's dtype has them."""
    cos = tl.load(COS + row * H + h, mask=mask_h, other=0.0)
    sin = tl.load(SIN + row * H + h, mask=mask_h, other=0.0)
    return _rounded(cos, Type, COS.dtype.element_ty), _rounded(sin, Type, COS.dtype.element_ty)


@triton.jit
def qkv_forward_kernel(
    Q,  # [T, A, H] like MIXED, written
    K,  # [S, K, H] like MIXED, written
    V,  # [S, K, H] like MIXED, written
    MIXED,  # [T, W] fp32, bf16, row stride mixed_stride
    Q_WEIGHT,  # [H], read only with EPS
    K_WEIGHT,  # [H], likewise
    COS,  # [T, H] Acc
    SIN,  # [T, H] Acc
    FIRST,  # [T + 1] int32: the places of token t are PLACES[FIRST[t] : FIRST[t + 1]], read only if SHARED
    PLACES,  # [S] int32, likewise
    mixed_stride,
    EPS: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    H: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
):
    """`qkv.qkv_norm_rope` of one token."""
    row = tl.program_id(0).to(tl.int64)
    Type: tl.constexpr = MIXED.dtype.element_ty
    PER: tl.constexpr = HEADS // GROUPS
    MIXED += row * mixed_stride
    h = tl.arange(0, HALF_TILE)[None, :]
    a = tl.arange(0, HEAD_TILE)[:, None]
    g = tl.arange(0, GROUP_TILE)[:, None]
    mask_h = h < H // 2
    mask_q = (a < HEADS) & mask_h
    mask_k = (g < GROUPS) & mask_h
    cos, sin = _angles(COS, SIN, row, h, mask_h, H, Type)  # pyright: ignore[reportGeneralTypeIssues]
    q_columns = (a // PER * (PER + 2) + a % PER) * H + h
    q_first, q_second = _turned(MIXED, q_columns, mask_q, Q_WEIGHT, h, mask_h, cos, sin, EPS, H)
    k_columns = (g * (PER + 2) + PER) * H + h
    k_first, k_second = _turned(MIXED, k_columns, mask_k, K_WEIGHT, h, mask_h, cos, sin, EPS, H)
    v_first = tl.load(MIXED + k_columns + H, mask=mask_k, other=0.0)
    v_second = tl.load(MIXED + k_columns + H + H // 2, mask=mask_k, other=0.0)
    _store_halves(Q + row * HEADS * H, a * H + h, q_first, q_second, mask_q, H // 2)
    k_first = k_first.to(Type)
    k_second = k_second.to(Type)
    if SHARED:
        for place in range(tl.load(FIRST + row), tl.load(FIRST + row + 1)):
            start = tl.load(PLACES + place).to(tl.int64) * GROUPS * H
            _store_halves(K + start, g * H + h, k_first, k_second, mask_k, H // 2)
            _store_halves(V + start, g * H + h, v_first, v_second, mask_k, H // 2)
    else:
        _store_halves(K + row * GROUPS * H, g * H + h, k_first, k_second, mask_k, H // 2)
        _store_halves(V + row * GROUPS * H, g * H + h, v_first, v_second, mask_k, H // 2)


@triton.jit
def _d_normed(
    d_first, d_second, first, second, WEIGHT, h, mask_h, EPS: tl.constexpr, H: tl.constexpr, Type: tl.constexpr
):
    """(halves of the gradient of x, halves of what this token adds to the weight's) from those of the norm's output."""
    Acc: tl.constexpr = first.dtype
    _, _, scale, unit_first, unit_second, weight_first, weight_second = _normed(  # pyright: ignore[reportGeneralTypeIssues]
        first, second, WEIGHT, h, mask_h, EPS, H, Type
    )
    m_first = d_first * weight_first
    m_second = d_second * weight_second
    dot = (tl.sum(m_first * first, 1) + tl.sum(m_second * second, 1))[:, None]
    pull = scale * scale * dot / tl.cast(H, Acc)
    dx_first = scale * (m_first - pull * first)
    dx_second = scale * (m_second - pull * second)
    return dx_first, dx_second, d_first * unit_first, d_second * unit_second


@triton.jit
def _places_sum(POINTER, PLACES, begin, end, columns, mask, GROUPS: tl.constexpr, H: tl.constexpr, Acc: tl.constexpr):
    """Halves of the sum of POINTER's rows at a token's places, in their order."""
    place = tl.load(PLACES + begin, mask=begin < end, other=0).to(tl.int64) * GROUPS * H
    first, second = _halves(POINTER + place, columns, mask & (begin < end), H // 2, Acc)  # pyright: ignore[reportGeneralTypeIssues]
    for number in range(begin + 1, end):
        place = tl.load(PLACES + number).to(tl.int64) * GROUPS * H
        more_first, more_second = _halves(POINTER + place, columns, mask, H // 2, Acc)
        first += more_first
        second += more_second
    return first, second


@triton.jit
def qkv_backward_kernel(
    D_MIXED,  # [T, W] like MIXED, contiguous, written
    D_WEIGHTS,  # [programs, 2, H] Acc: each program's part of the gradients of both weights, written only with EPS
    D_Q,  # [T, A, H]
    D_K,  # [S, K, H]
    D_V,  # [S, K, H]
    MIXED,  # [T, W], row stride mixed_stride, read only with EPS
    Q_WEIGHT,  # [H], likewise
    K_WEIGHT,  # [H], likewise
    COS,  # [T, H] Acc
    SIN,  # [T, H] Acc
    FIRST,  # [T + 1] int32, read only if SHARED
    PLACES,  # [S] int32, likewise
    mixed_stride,
    tokens,
    EPS: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    H: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of `qkv.qkv_norm_rope` for ROWS tokens."""
    program = tl.program_id(0).to(tl.int64)
    Type: tl.constexpr = D_MIXED.dtype.element_ty
    Acc: tl.constexpr = COS.dtype.element_ty
    PER: tl.constexpr = HEADS // GROUPS
    h = tl.arange(0, HALF_TILE)[None, :]
    a = tl.arange(0, HEAD_TILE)[:, None]
    g = tl.arange(0, GROUP_TILE)[:, None]
    mask_h = h < H // 2
    mask_q = (a < HEADS) & mask_h
    mask_k = (g < GROUPS) & mask_h
    q_columns = (a // PER * (PER + 2) + a % PER) * H + h
    k_columns = (g * (PER + 2) + PER) * H + h
    dwq_first = tl.zeros((HEAD_TILE, HALF_TILE), Acc)
    dwq_second = tl.zeros((HEAD_TILE, HALF_TILE), Acc)
    dwk_first = tl.zeros((GROUP_TILE, HALF_TILE), Acc)
    dwk_second = tl.zeros((GROUP_TILE, HALF_TILE), Acc)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, tokens)):
        X = MIXED + row * mixed_stride
        DX = D_MIXED + row * ((HEADS + 2 * GROUPS) * H)
        cos, sin = _angles(COS, SIN, row, h, mask_h, H, Type)
        dq_first, dq_second = _halves(D_Q + row * (HEADS * H), a * H + h, mask_q, H // 2, Acc)
        if SHARED:
            begin = tl.load(FIRST + row)
            end = tl.load(FIRST + row + 1)
            dk_first, dk_second = _places_sum(D_K, PLACES, begin, end, g * H + h, mask_k, GROUPS, H, Acc)
            dv_first, dv_second = _places_sum(D_V, PLACES, begin, end, g * H + h, mask_k, GROUPS, H, Acc)
        else:
            dk_first, dk_second = _halves(D_K + row * (GROUPS * H), g * H + h, mask_k, H // 2, Acc)
            dv_first, dv_second = _halves(D_V + row * (GROUPS * H), g * H + h, mask_k, H // 2, Acc)
        dq_first, dq_second = dq_first * cos + dq_second * sin, dq_second * cos - dq_first * sin
        dk_first, dk_second = dk_first * cos + dk_second * sin, dk_second * cos - dk_first * sin
        if EPS is not None:
            x_first, x_second = _halves(X, q_columns, mask_q, H // 2, Acc)
            dq_first, dq_second, add_first, add_second = _d_normed(
                dq_first, dq_second, x_first, x_second, Q_WEIGHT, h, mask_h, EPS, H, Type
            )
            dwq_first += add_first
            dwq_second += add_second
            x_first, x_second = _halves(X, k_columns, mask_k, H // 2, Acc)
            dk_first, dk_second, add_first, add_second = _d_normed(
                dk_first, dk_second, x_first, x_second, K_WEIGHT, h, mask_h, EPS, H, Type
            )
            dwk_first += add_first
            dwk_second += add_second
        _store_halves(DX, q_columns, dq_first, dq_second, mask_q, H // 2)
        _store_halves(DX, k_columns, dk_first, dk_second, mask_k, H // 2)
        _store_halves(DX, k_columns + H, dv_first, dv_second, mask_k, H // 2)
    if EPS is not None:
        D_WEIGHTS += program * 2 * H
        columns = tl.arange(0, HALF_TILE)
        mask = columns < H // 2
        _store_halves(D_WEIGHTS, columns, tl.sum(dwq_first, 0), tl.sum(dwq_second, 0), mask, H // 2)
        _store_halves(D_WEIGHTS + H, columns, tl.sum(dwk_first, 0), tl.sum(dwk_second, 0), mask, H // 2)


@cache
def tiles(heads: int, groups: int, width: int) -> tuple[dict[str, int], int]:
    """(the kernels' constants for these head counts, warps)."""
    head_tile, half_tile = (int(triton.next_power_of_2(size)) for size in (heads, width // 2))
    constants = {"HEADS": heads, "GROUPS": groups, "H": width, "HEAD_TILE": head_tile, "HALF_TILE": half_tile}
    constants["GROUP_TILE"] = int(triton.next_power_of_2(groups))
    return constants, min(max(head_tile * half_tile // (32 * ELEMENTS), 1), 16)


def forward_(
    outputs: tuple[Tensor, ...], mixed_TW: Tensor, others: tuple[Tensor, ...], shape: tuple, **options
) -> None:
    """Writes q, k and v. others: both weights, cosines, sines, first places, places. shape: (A, K, H)."""
    constants, warps = tiles(*shape)
    with torch.cuda.device(mixed_TW.device if mixed_TW.is_cuda else -1):  # -1: does nothing
        qkv_forward_kernel[(mixed_TW.shape[0],)](
            *outputs,
            mixed_TW,  # pyright: ignore[reportCallIssue]
            *others,
            mixed_TW.stride(0),  # pyright: ignore[reportCallIssue]
            **constants,
            **options,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )


def backward_(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], shape: tuple, **options) -> None:
    """Writes d_mixed and the parts of the weights' gradients. inputs: d_q, d_k, d_v, then those of `forward_`."""
    (constants, warps), mixed_TW = tiles(*shape), inputs[3]
    with torch.cuda.device(mixed_TW.device if mixed_TW.is_cuda else -1):
        qkv_backward_kernel[(outputs[1].shape[0],)](
            *outputs,
            *inputs,
            mixed_TW.stride(0),  # pyright: ignore[reportCallIssue]
            mixed_TW.shape[0],  # pyright: ignore[reportCallIssue]
            **constants,
            **options,
            ROWS=ROWS,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )
