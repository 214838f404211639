"""What computes a layer's norm, gated activation, rotation and attention: liger-kernel and flash-attn where they are
installed and the tensors are on CUDA, plain torch otherwise. `layer_ops` is the one place that chooses.

T packed tokens, A query heads, K key/value heads, H head width, F feed-forward width, B sequences.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LayerOps:
    """One function for each piece.

    rms_norm(x [..., D], weight [D], eps) -> [..., D]
    swiglu(gate_up [..., 2F]) -> [..., F]
    rope(q [T, 1, A, H], k [T, 1, K, H], cos [T, 1, 1, H], sin [T, 1, 1, H]) -> q, k turned
    attention(q [T, A, H], k [T, K, H], v [T, K, H], cu_seqlens int32 [B + 1], max_seqlen, scale) -> [T, A, H]
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name).__name__.split('_', 1)[0]}" for f in fields(self))


@cache
def layer_ops(device: str, dtype: torch.dtype) -> LayerOps:
    """The fastest this machine has for tensors of `dtype` on `device` ("cuda", "cpu")."""
    if device != "cuda":
        return LayerOps(torch_rms_norm, torch_swiglu, torch_rope, sdpa_attention)
    attention = sdpa_attention  # the varlen kernels know half precision only
    if dtype in (torch.bfloat16, torch.float16):
        attention = flash_attention if _installed("flash_attn") else varlen_attention
    if _installed("liger_kernel"):
        return LayerOps(liger_rms_norm, liger_swiglu, liger_rope, attention)
    return LayerOps(torch_rms_norm, torch_swiglu, torch_rope, attention)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- torch: runs anywhere ------------------------------------------------------------------------------------------


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_swiglu(gate_up_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def torch_rope(q_T1AH: Tensor, k_T1KH: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x * cos_T11H + _rotate_half(x) * sin_T11H for x in (q_T1AH, k_T1KH))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def sdpa_attention(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    """One scaled_dot_product_attention for each run of sequences of equal length (`pack` lays them side by side)."""
    runs = [(length, len(list(run))) for length, run in groupby(cu_seqlens.diff().tolist())]
    parts = [x.split([length * count for length, count in runs]) for x in (q_TAH, k_TKH, v_TKH)]
    outs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def varlen_attention(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    """torch.nn.attention.varlen; key and value heads are repeated, as not every torch since 2.11 takes fewer."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TAH.shape[1] // k_TKH.shape[1]
    k_TAH, v_TAH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    return varlen_attn(
        q_TAH, k_TAH, v_TAH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0)
    )


# -- liger-kernel and flash-attn: CUDA -----------------------------------------------------------------------------


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`llama`: the product with the weight is rounded as transformers and vLLM round it. Not in place: Megatron may
    still hold the gradient that comes in (pipeline buffers, recomputation)."""
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False, None)


def liger_swiglu(gate_up_T2F: Tensor) -> Tensor:
    """Reads both halves from Megatron's one buffer: no copies of the halves, no concatenated gradient. Its gradient
    comes back as a matrix whatever the input's shape was, so it is given one."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    out_TF = LigerFusedGateUpSiLUMulFunction.apply(gate_up_T2F.view(-1, gate_up_T2F.shape[-1]))
    return out_TF.view(*gate_up_T2F.shape[:-1], -1)


def liger_rope(q_T1AH: Tensor, k_T1KH: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's plain rope: `Rotary` has chosen the axis of every frequency already, so its three-axis kernel, which
    reads three planes of cosines, is not needed. It wants [1, heads, T, H] strided as [1, T, heads, H]: views of ours.

    It turns a contiguous input in place, which nothing else reads: q and k are fresh copies out of the projection's
    buffer (a key that is still a view of it is copied first), or the output of a norm, which does not keep it.
    """
    from liger_kernel.ops import LigerRopeFunction

    q_1ATH, k_1KTH = (x.permute(1, 2, 0, 3) for x in (q_T1AH, k_T1KH))
    turned = LigerRopeFunction.apply(q_1ATH, k_1KTH, cos_T11H[None, :, 0, 0], sin_T11H[None, :, 0, 0])
    return tuple(x.permute(2, 0, 1, 3) for x in turned)


def flash_attention(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_TAH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
    )
