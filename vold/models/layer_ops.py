"""The functions behind a layer's norms, its split into queries, keys and values, its gated activation, attention and
delta rule: on CUDA our kernels, and liger-kernel's, flash-attn's and flash-linear-attention's where these are
installed, plain torch otherwise. `layer_ops` alone chooses.

T packed tokens, S keys and values that attention reads (T, or more where responses share a prompt), A query heads,
K key/value heads, H head width, W = (A + 2K) H, F feed-forward width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vold.models.delta_rule import fla_delta_rule, torch_delta_rule
from vold.models.layer_shapes import (
    meta_add_norm,
    meta_cpu_attention,
    meta_fla_delta_rule,
    meta_flash_attention,
    meta_qkv,
    meta_rms_norm,
    meta_swiglu,
)
from vold_kernels import add_norm, qkv
from vold_kernels.qkv import Heads, SharedKeys


@dataclass(frozen=True)
class LayerOps:
    """One function for each part of a layer.

    rms_norm(x [..., D], weight [D], eps) -> [..., D]
    add_norm(x, residual, weight [D], eps) -> their sum, its norm; all [..., D]
    qkv(mixed [T, W], norms' weights or None, cos_sin [2, T, H], heads, shared or None)
        -> q [T, A, H], k and v [S, K, H], normed and rotated; see vold_kernels.qkv
    swiglu(gate_up [..., 2F]) -> [..., F]
    attention(q [T, A, H], k [S, K, H], v [S, K, H], packed, scale) -> [T, A, H], causal from the end of each segment
    delta_rule(qkv, decay, beta, start, runs) -> outputs, states at the end; see vold.models.delta_rule
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    qkv: Callable[[Tensor, tuple[Tensor, Tensor] | None, Tensor, Heads, SharedKeys | None], tuple[Tensor, ...]]
    swiglu: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, PackedSeqParams, float], Tensor]
    delta_rule: Callable[..., tuple[Tensor, Tensor]] = torch_delta_rule

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name).__name__.split('_', 1)[0]}" for f in fields(self))


@cache
def layer_ops(device: str, dtype: torch.dtype) -> LayerOps:
    """The fastest functions on this machine for tensors of `dtype` on `device` ("cuda", "cpu"). On "meta", stand-ins
    for those of the device named by `simulate_device`."""
    if device == "meta":
        return _meta_layer_ops(_simulated_device)
    if device != "cuda":
        return TORCH_OPS
    attention = sdpa_attention  # the varlen kernels know half precision only
    if dtype in (torch.bfloat16, torch.float16):
        attention = _flash_attention() or varlen_attention
    swiglu = liger_swiglu if _installed("liger_kernel") else torch_swiglu
    delta_rule = fla_delta_rule if attention is not sdpa_attention and _installed("fla") else torch_delta_rule
    return LayerOps(vold_rms_norm, vold_add_norm, vold_qkv, swiglu, attention, delta_rule)


def _flash_attention() -> Callable[..., Tensor] | None:
    """FlashAttention 3 on Hopper, the only GPU it knows, else flash-attn 2; None where neither is installed."""
    if _installed("flash_attn_interface") and torch.cuda.get_device_capability()[0] == 9:
        return flash3_attention
    return flash_attention if _installed("flash_attn") else None


_simulated_device = "cuda"


@contextmanager
def simulate_device(device: str) -> Iterator[None]:
    """Inside, tensors on meta stand for tensors on `device` ("cuda" with liger-kernel, flash-attn and
    flash-linear-attention, or "cpu")."""
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
        attention = (meta_flash_attention, meta_fla_delta_rule)
        return LayerOps(meta_rms_norm, meta_add_norm, meta_qkv, meta_swiglu, *attention)
    return replace(TORCH_OPS, attention=partial(sdpa_attention, attend=meta_cpu_attention))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- torch: runs anywhere ------------------------------------------------------------------------------------------


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_swiglu(gate_up_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, torch_rms_norm(total, weight, eps)


def torch_qkv(
    mixed_TW: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos_sin_2TH: Tensor,
    heads: Heads,
    shared: SharedKeys | None,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = mixed_TW.view(len(mixed_TW), heads.keys, -1).split([*heads.split], dim=2)
    q_TAH, k_TKH, v_TKH = (x.reshape(len(mixed_TW), -1, heads.width) for x in parts)
    if norms is not None:
        q_TAH, k_TKH = (torch_rms_norm(x, w, heads.eps) for x, w in zip((q_TAH, k_TKH), norms, strict=True))
    q_TAH, k_TKH = (rotate(x, cos_sin_2TH) for x in (q_TAH, k_TKH))
    if shared is not None:
        k_TKH, v_TKH = (gather_keys(x, shared.index_S) for x in (k_TKH, v_TKH))
    return q_TAH, k_TKH, v_TKH


def gather_keys(x_TKH: Tensor, index_S: Tensor) -> Tensor:
    """Look up rows of x as an embedding does, whose backward adds a row's gradients up in a fixed order."""
    return F.embedding(index_S, x_TKH.flatten(1)).view(-1, *x_TKH.shape[1:])


def rotate(x_TAH: Tensor, cos_sin_2TH: Tensor) -> Tensor:
    """Rotate column h of each head with column h + H / 2."""
    cos_T1H, sin_T1H = cos_sin_2TH.to(x_TAH.dtype)[:, :, None]
    first, second = x_TAH.chunk(2, dim=-1)
    return x_TAH * cos_T1H + torch.cat((-second, first), dim=-1) * sin_T1H


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
    for (queries, keys, count), *parts in zip(runs, q_parts, k_parts, v_parts, strict=True):
        q, k, v = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in parts)
        mask = None  # is_causal counts from the first key, and flash-attn and torch's varlen kernel from the last
        if queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        out = attend(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


TORCH_OPS = LayerOps(torch_rms_norm, torch_add_norm, torch_qkv, torch_swiglu, sdpa_attention)


def varlen_attention(q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """torch.nn.attention.varlen; key and value heads are repeated, as not every torch since 2.11 takes fewer."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TAH.shape[1] // k_SKH.shape[1]
    k_SAH, v_SAH = (x.repeat_interleave(groups, dim=1) for x in (k_SKH, v_SKH))
    return varlen_attn(q_TAH, k_SAH, v_SAH, *_bounds(packed), scale=scale, window_size=(-1, 0))


def _bounds(packed: PackedSeqParams) -> tuple[Tensor, Tensor, int, int]:
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv


# -- our kernels, liger-kernel and flash-attn: CUDA ----------------------------------------------------------------


def vold_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The product with the weight is rounded as transformers and vLLM round it."""
    return add_norm.rms_norm(x, weight, eps)


def vold_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return add_norm.add_rms_norm(x, residual, weight, eps)


def vold_qkv(
    mixed_TW: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos_sin_2TH: Tensor,
    heads: Heads,
    shared: SharedKeys | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.qkv_norm_rope(mixed_TW, norms, cos_sin_2TH, heads, shared)


def liger_swiglu(gate_up_T2F: Tensor) -> Tensor:
    """Reads both halves from Megatron's one buffer: no copies of the halves, no concatenated gradient. Its gradient
    comes back as a matrix whatever the input's shape was, so it is given one."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    out_TF = LigerFusedGateUpSiLUMulFunction.apply(gate_up_T2F.view(-1, gate_up_T2F.shape[-1]))
    return out_TF.view(*gate_up_T2F.shape[:-1], -1)


def flash_attention(q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """Since flash-attn 2.1 causal means from the last key, as `PackedTokens` does. Its backward pass adds up dQ with
    atomics, in no fixed order, unless torch is deterministic (`parallel.deterministic`)."""
    from flash_attn import flash_attn_varlen_func

    order = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return flash_attn_varlen_func(q_TAH, k_SKH, v_SKH, *_bounds(packed), softmax_scale=scale, causal=True, **order)


def flash3_attention(q_TAH: Tensor, k_SKH: Tensor, v_SKH: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """FlashAttention 3, built from flash-attn's folder `hopper`; causal and order as in `flash_attention`. Its first
    releases return the softmax's totals too."""
    from flash_attn_interface import flash_attn_varlen_func

    order = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    out = flash_attn_varlen_func(q_TAH, k_SKH, v_SKH, *_bounds(packed), softmax_scale=scale, causal=True, **order)
    return out[0] if isinstance(out, tuple) else out


# -- memory ---------------------------------------------------------------------------------------------------------


def saved_as(tensor: Tensor, recompute: Callable[[], Tensor]) -> AbstractContextManager:
    """What is computed inside keeps `recompute` for its backward pass, not `tensor`, whose value that gives again."""
    storage = tensor.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    @torch.no_grad()
    def unpack(saved: Tensor | torch.Size) -> Tensor:
        return saved if isinstance(saved, Tensor) else recompute().view(saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
