"""Queries, keys and values for attention from a layer's joint projection.

    q = rope(norm(x) w_q),  k = rope(norm(x) w_k),  v = x          norm(x) = x / sqrt(mean(x²) + eps), or x where there
                                                                  are no weights
    rope(x)_h = x_h cos_h − x_{h + H/2} sin_h,   rope(x)_{h + H/2} = x_{h + H/2} cos_h + x_h sin_h     h < H/2

Shape letters as in `qkv_triton.py`: T tokens, S keys, A query heads, K key/value heads, H head width, W columns of the
projection. Where segments share tokens (a prompt and its responses), keys and values of a token are written to each of
its places among the S keys, and the gradients of these places add up in fp32, in their order: two runs are equal to the
bit, and nothing is sorted but the places, once a micro-batch. `reference.qkv_norm_rope` is the specification.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """A query heads, K key/value heads, their width H, and the norms' eps (None: the heads have no norms)."""

    queries: int
    keys: int
    width: int
    eps: float | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.queries, self.keys, self.width

    @property
    def split(self) -> tuple[int, int, int]:
        """Columns of a key head's queries, of its key and of its value."""
        return self.queries // self.keys * self.width, self.width, self.width


@dataclass(frozen=True)
class SharedKeys:
    """Keys that segments share. index_S: int64 [S], the token of each key; tokens: T."""

    index_S: Tensor
    tokens: int

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(first_T1, place_S), int32: token t's keys are place_S[first_T1[t] : first_T1[t + 1]]. Sorted on first use,
        once for all layers of a micro-batch; the host waits for nothing."""
        sorted_S, place_S = torch.sort(self.index_S, stable=True)
        all_T1 = torch.arange(self.tokens + 1, device=self.index_S.device)
        return torch.searchsorted(sorted_S, all_T1, out_int32=True), place_S.int()


def qkv_norm_rope(
    mixed_TW: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos_sin_2TH: Tensor,
    heads: Heads,
    shared: SharedKeys | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, A, H], k and v [S, K, H] (S = T without `shared`), contiguous, by Triton: CUDA, or its interpreter.

    mixed_TW: for each key head its A/K query heads, its key and its value, rows contiguous. weights: of the norms of
    queries and keys, with heads.eps. cos_sin_2TH: fp32 (fp64 for fp64), both halves of H alike.
    """
    assert (weights is None) == (heads.eps is None), "norms have weights and an eps, or neither"
    return _QkvNormRope.apply(mixed_TW, *(weights or (None, None)), cos_sin_2TH, heads, shared)


class _QkvNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed_TW, q_weight_H, k_weight_H, cos_sin_2TH, heads: Heads, shared: SharedKeys | None):
        from . import qkv_triton  # on first use: a CPU needs no triton

        assert mixed_TW.stride(1) == 1 and cos_sin_2TH.is_contiguous()
        tokens = mixed_TW.shape[0]
        keys = tokens if shared is None else shared.index_S.shape[0]
        q_TAH = mixed_TW.new_empty(tokens, heads.queries, heads.width)
        k_SKH, v_SKH = (mixed_TW.new_empty(keys, heads.keys, heads.width) for _ in range(2))
        others = _others(mixed_TW, q_weight_H, k_weight_H, cos_sin_2TH, shared)
        options = {"EPS": heads.eps, "SHARED": shared is not None}
        qkv_triton.forward_((q_TAH, k_SKH, v_SKH), mixed_TW, others, heads.sizes, **options)
        ctx.heads, ctx.shared = heads, shared
        ctx.save_for_backward(*(() if heads.eps is None else (mixed_TW, q_weight_H, k_weight_H)), cos_sin_2TH)
        return q_TAH, k_SKH, v_SKH

    @staticmethod
    def backward(ctx, d_q_TAH, d_k_SKH, d_v_SKH):
        from . import qkv_triton

        heads, (*normed, cos_sin_2TH) = ctx.heads, ctx.saved_tensors
        tokens, columns = d_q_TAH.shape[0], (heads.queries + 2 * heads.keys) * heads.width
        d_mixed_TW = d_q_TAH.new_empty(tokens, columns)
        mixed_TW, q_weight_H, k_weight_H = normed or (d_mixed_TW, None, None)
        programs = -(-tokens // qkv_triton.ROWS)
        d_weights_2H = cos_sin_2TH.new_empty(programs, 2, heads.width if normed else 0)
        gradients = [x.contiguous() for x in (d_q_TAH, d_k_SKH, d_v_SKH)]
        others = _others(mixed_TW, q_weight_H, k_weight_H, cos_sin_2TH, ctx.shared)
        options = {"EPS": heads.eps, "SHARED": ctx.shared is not None}
        inputs: Any = (*gradients, mixed_TW, *others)
        qkv_triton.backward_((d_mixed_TW, d_weights_2H), inputs, heads.sizes, **options)
        if q_weight_H is None:
            return d_mixed_TW, None, None, None, None, None
        return d_mixed_TW, *d_weights_2H.sum(0).to(q_weight_H.dtype), None, None, None


def _others(mixed_TW: Tensor, q_weight_H, k_weight_H, cos_sin_2TH: Tensor, shared: SharedKeys | None):
    """The kernels' other pointers; those that are not read are any tensor's."""
    weights = (mixed_TW, mixed_TW) if q_weight_H is None else (q_weight_H, k_weight_H)
    places = (cos_sin_2TH, cos_sin_2TH) if shared is None else shared.places
    return *weights, *cos_sin_2TH, *places
