"""Stand-ins for a layer's kernels on the meta device: no numbers, but the same tensors made and kept for backward, so
that a step run there tells its memory (vold.planning.meta_memory).

On a GPU the layers call our kernels, liger-kernel, flash-attn and flash-linear-attention (see vold.models.layer_ops);
all need a stand-in.
On a CPU only attention does: torch knows the shapes of its other operators. T packed tokens, A query heads,
K key/value heads, H head width, F feed-forward width, W columns of the joint projection.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vold.models.runs import CHUNK, RunLengths
from vold_kernels.qkv import Heads, SharedKeys


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor):
        total = x if residual is None else torch.empty_like(x)
        ctx.save_for_backward(total, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))  # 1 / rms of each row
        return torch.empty_like(x) if residual is None else (total, torch.empty_like(x))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.empty_like(gradients[-1])
        return dx, None if len(gradients) == 1 else dx, torch.empty_like(ctx.saved_tensors[1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx, _d_out: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Qkv(torch.autograd.Function):
    """vold_kernels.qkv keeps the joint projection where heads have norms, else only the angles."""

    @staticmethod
    def forward(ctx, mixed_TW, q_weight, k_weight, cos_sin, heads: Heads, shared: SharedKeys | None):
        keys = len(mixed_TW) if shared is None else len(shared.index_S)
        ctx.save_for_backward(*(() if q_weight is None else (mixed_TW, q_weight, k_weight)), cos_sin)
        ctx.columns = mixed_TW.shape[1]
        k_and_v = (mixed_TW.new_empty(keys, heads.keys, heads.width) for _ in range(2))
        return mixed_TW.new_empty(len(mixed_TW), heads.queries, heads.width), *k_and_v

    @staticmethod
    def backward(ctx, dq: Tensor, _dk: Tensor, _dv: Tensor) -> tuple[Tensor | None, ...]:
        weights = (torch.empty_like(x) for x in ctx.saved_tensors[1:3]) if len(ctx.saved_tensors) > 1 else (None, None)
        return dq.new_empty(len(dq), ctx.columns), *weights, None, None, None


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        out_TAH = torch.empty_like(q_TAH, memory_format=torch.contiguous_format)
        log_total_AT = q_TAH.new_empty(q_TAH.shape[1::-1], dtype=torch.float32)
        ctx.save_for_backward(q_TAH, k_SKH, v_SKH, out_TAH, log_total_AT)
        return out_TAH

    @staticmethod
    def backward(ctx, _d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_TAH, k_SKH, v_SKH, _, log_total_AT = ctx.saved_tensors
        _scratch = torch.empty_like(log_total_AT), q_TAH.new_empty(q_TAH.shape, dtype=torch.float32)  # its dQ is fp32
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TAH, k_SKH, v_SKH))


class _DeltaRule(torch.autograd.Function):
    """flash-linear-attention keeps q and k of length 1 with their lengths, v, decay, beta, the chunks' triangular
    systems and the first states; each pass computes the states before all chunks anew."""

    @staticmethod
    def forward(ctx, q_TKH: Tensor, k_TKH: Tensor, v_TAW: Tensor, decay_TA, beta_TA, start_RAHW, runs: RunLengths):
        lengths = [x.new_empty(x.shape[:2], dtype=torch.float32) for x in (q_TKH, k_TKH)]
        system_TAC = k_TKH.new_empty(*v_TAW.shape[:2], CHUNK)
        units = (torch.empty_like(q_TKH), torch.empty_like(k_TKH), *lengths)
        ctx.save_for_backward(*units, v_TAW, torch.empty_like(decay_TA), beta_TA, system_TAC, start_RAHW)
        ctx.runs = runs
        _scratch = _chunk_states(k_TKH, v_TAW, runs)
        shape = (len(runs.lengths), v_TAW.shape[1], k_TKH.shape[2], v_TAW.shape[2])
        return torch.empty_like(v_TAW), v_TAW.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx, _d_out: Tensor, _d_end: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, _, _, v, decay, beta, _, start = ctx.saved_tensors
        _scratch = _chunk_states(k, v, ctx.runs), _chunk_states(k, v, ctx.runs)  # the states and their gradients
        gradients = [None if x is None else torch.empty_like(x) for x in (q, k, v, decay, beta, start)]
        return *gradients, None


def _chunk_states(k_TKH: Tensor, v_TAW: Tensor, runs: RunLengths) -> tuple[Tensor, ...]:
    """What a pass holds: each chunk's first state, and for each token what it changes and finds."""
    chunks = sum(-(-length // CHUNK) for length in runs.lengths)
    found = v_TAW.new_empty(*v_TAW.shape[:2], k_TKH.shape[2])
    return v_TAW.new_empty(chunks, v_TAW.shape[1], k_TKH.shape[2], v_TAW.shape[2]), torch.empty_like(v_TAW), found


class _CpuAttention(torch.autograd.Function):
    """aten's flash attention for CPUs, whose output and gradients lie in memory as [batch, T, heads, H]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = _transposed_empty(q)
        bias = None if mask is None else q.new_empty(mask.shape)  # a mask of booleans becomes one to add
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), bias)
        return out

    @staticmethod
    def backward(ctx, _d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *(_transposed_empty(x) for x in ctx.saved_tensors[:3]), None


def _transposed_empty(x_BATH: Tensor) -> Tensor:
    batch, heads, tokens, width = x_BATH.shape
    return x_BATH.new_empty(batch, tokens, heads, width).transpose(1, 2)


def meta_cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_options) -> Tensor:
    return _CpuAttention.apply(q, k, v, mask)


def meta_rms_norm(x: Tensor, weight: Tensor, _eps: float) -> Tensor:
    return _AddNorm.apply(x, None, weight)


def meta_add_norm(x: Tensor, residual: Tensor, weight: Tensor, _eps: float) -> tuple[Tensor, Tensor]:
    return _AddNorm.apply(x, residual, weight)


def meta_qkv(
    mixed_TW: Tensor, norms: tuple[Tensor, Tensor] | None, cos_sin: Tensor, heads: Heads, shared: SharedKeys | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _Qkv.apply(mixed_TW, *(norms or (None, None)), cos_sin, heads, shared)


def meta_swiglu(gate_up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_up)


def meta_fla_delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], decay_TA: Tensor, beta_TA: Tensor, start_RAHW: Tensor | None, runs: RunLengths
) -> tuple[Tensor, Tensor]:
    return _DeltaRule.apply(*qkv, decay_TA, beta_TA, start_RAHW, runs)


def meta_flash_attention(q: Tensor, k: Tensor, v: Tensor, _packed: PackedSeqParams, _scale: float) -> Tensor:
    return _FlashAttention.apply(q, k, v)
