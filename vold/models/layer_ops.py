"""The functions behind a layer's norm, gated activation, rotary embedding and attention: liger-kernel and flash-attn
where they are installed and the tensors are on CUDA, plain torch otherwise. `layer_ops` alone chooses.

T packed tokens, S keys and values that attention reads (T, or more where responses share a prompt), A query heads,
K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vold.models.layer_shapes import meta_cpu_attention, meta_flash_attention, meta_rms_norm, meta_rope, meta_swiglu


@dataclass(frozen=True)
class LayerOps:
    """One function for each part of a layer.

    rms_norm(x [..., D], weight [D], eps) -> [..., D]
    swiglu(gate_up [..., 2F]) -> [..., F]
    rope(q [T, 1, A, H], k [T, 1, K, H], cos [T, 1, 1, H], sin [T, 1, 1, H]) -> q, k rotated
    attention(q [T, A, H], k [S, K, H], v [S, K, H], packed, scale) -> [T, A, H], causal from the end of each segment
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, PackedSeqParams, float], Tensor]

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name).__name__.split('_', 1)[0]}" for f in fields(self))


@cache
def layer_ops(device: str, dtype: torch.dtype) -> LayerOps:
    """The fastest functions on this machine for tensors of `dtype` on `device` ("cuda", "cpu"). On "meta", stand-ins
    for those of the device named by `simulate_device`."""
    if device == "meta":
        return _meta_layer_ops(_simulated_device)
    if device != "cuda":
        return LayerOps(torch_rms_norm, torch_swiglu, torch_rope, sdpa_attention)
    attention = sdpa_attention  # the varlen kernels know half precision only
    if dtype in (torch.bfloat16, torch.float16):
        attention = flash_attention if _installed("flash_attn") else varlen_attention
    if _installed("liger_kernel"):
        return LayerOps(liger_rms_norm, liger_swiglu, liger_rope, attention)
    return LayerOps(torch_rms_norm, torch_swiglu, torch_rope, attention)


_simulated_device = "cuda"


@contextmanager
def simulate_device(device: str) -> Iterator[None]:
    """Inside, tensors on meta stand for tensors on `device` ("cuda" with liger-kernel and flash-attn, or "cpu")."""
    global _simulated_device
    before, _simulated_device = _simulated_device, device
    layer_ops.cache_clear()
    try:
        yield
    finally:
        _simulated_device = before
        layer_ops.cache_clear()


def _meta_layer_ops(device: str) -> LayerOps:
    if device == "cuda":
        return LayerOps(meta_rms_norm, meta_swiglu, meta_rope, meta_flash_attention)
    return LayerOps(torch_rms_norm, torch_swiglu, torch_rope, partial(sdpa_attention, attend=meta_cpu_attention))


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


def sdpa_attention(
    q_TAH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    packed: PackedSeqParams,
    scale: float,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """One scaled_dot_product_attention for each run of segments of equal shape (`pack` lays them side by side)."""
    shapes = zip(packed.cu_seqlens_q.diff().tolist(), packed.cu_seqlens_kv.diff().tolist(), strict=True)
    runs = [(*shape, len(list(run))) for shape, run in groupby(shapes)]
    q_parts = q_TAH.split([queries * count for queries, _, count in runs])
    k_parts, v_parts = (x.split([keys * count for _, keys, count in runs]) for x in (k_SKH, v_SKH))
    outs = []
    for (queries, keys, count), *qkv in zip(runs, q_parts, k_parts, v_parts, strict=True):
        q, k, v = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)
        mask = None  # is_causal counts from the first key, and flash-attn and torch's varlen kernel from the last
        if queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        out = attend(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def varlen_attention(q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """torch.nn.attention.varlen; key and value heads are repeated, as not every torch since 2.11 takes fewer."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TAH.shape[1] // k_SKH.shape[1]
    k_SAH, v_SAH = (x.repeat_interleave(groups, dim=1) for x in (k_SKH, v_SKH))
    return varlen_attn(q_TAH, k_SAH, v_SAH, *_bounds(packed), scale=scale, window_size=(-1, 0))


def _bounds(packed: PackedSeqParams) -> tuple[Tensor, Tensor, int, int]:
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv


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
    reads three planes of cosines, is not needed. It takes [1, heads, T, H] strided as [1, T, heads, H]: views of ours.

    It rotates a contiguous input in place, which nothing else reads: q and k are fresh copies out of the projection's
    buffer (a key that is still a view of it is copied first), or the output of a norm, which does not keep it.
    """
    from liger_kernel.ops import LigerRopeFunction

    q_1ATH, k_1KTH = (x.permute(1, 2, 0, 3) for x in (q_T1AH, k_T1KH))
    turned = LigerRopeFunction.apply(q_1ATH, k_1KTH, cos_T11H[None, :, 0, 0], sin_T11H[None, :, 0, 0])
    return tuple(x.permute(2, 0, 1, 3) for x in turned)


def flash_attention(q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """Since flash-attn 2.1 causal means from the last key, as `PackedTokens` does. Its backward pass adds up dQ with
    atomics, in no fixed order, unless torch is deterministic (`parallel.deterministic`)."""
    from flash_attn import flash_attn_varlen_func

    order = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return flash_attn_varlen_func(q_TAH, k_SKH, v_SKH, *_bounds(packed), softmax_scale=scale, causal=True, **order)
