"""Our modules in Megatron's layer spec: norms, SwiGLU, rotary embedding, attention over packed sequences, the layer.

T packed tokens, D hidden width, A query heads, K key/value heads, H head width, F feed-forward width. Packing is the
only input format: Megatron calls it "thd". Megatron's own norm refuses sequence parallelism and its own attention
refuses packing. Its linear layers are kept, with their tensor and sequence parallelism; the forward passes of its layer
and attention are not: their Python takes longer than the GPU does at short micro-batches. The functions behind each
module are chosen in `vold.models.layer_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from vold.models.architecture import Architecture, Mixture
from vold.models.experts import MixtureOfExperts
from vold.models.layer_ops import layer_ops, saved_as
from vold.models.router_replay import PassRouting
from vold.models.runs import Runs
from vold.parallel.context import heads_for_tokens, tokens_for_heads
from vold.parallel.launch import ExpertLayout
from vold_kernels.qkv import Heads, SharedKeys


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the attribute by which Megatron sums the weight's gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        norm, normed = getattr(x, "norm_ahead", (None, None))
        if norm is self and normed.requires_grad == x.requires_grad:
            del x.norm_ahead
            return normed
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        return layer_ops(x.device.type, x.dtype).rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm)"""
        return layer_ops(x.device.type, x.dtype).add_norm(x, residual, self.weight, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm times 1 + weight, in fp32 up to the one rounding of the result, as transformers and vLLM have Qwen3.5's.
    In plain torch on every device."""

    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, self.normed(total)


class SwiGLU(MegatronModule):
    """silu(gate) * up; the activation slot of Megatron's MLP, which passes both halves in one buffer."""

    def forward(self, gate_up_T2F: Tensor) -> Tensor:
        return layer_ops(gate_up_T2F.device.type, gate_up_T2F.dtype).swiglu(gate_up_T2F)


class Rotary(nn.Module):
    """Angles of the rotary embedding for positions on three axes (temporal, height, width).

    Replaces Megatron's MultimodalRotaryEmbedding: the same angles, but the inverse frequencies are computed on
    the CPU in float32, as transformers does (scaled ones too: see vold.models.architecture), and multiplied
    elementwise, so that no matmul precision setting (TF32, autocast) changes a position.
    """

    def __init__(self, arch: Architecture, device: torch.device):
        super().__init__()
        # Plain attributes, not buffers: a later `.to(bfloat16)` of the model must not touch them.
        self.inverse_frequency = torch.tensor(arch.rope_frequencies, dtype=torch.float32, device="cpu").to(device)
        self.axis = torch.tensor(arch.mrope_axes, device=device)
        self.factor = arch.rope_factor

    @torch.no_grad()
    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group=None) -> Tensor:
        """position_ids int64 [3, 1, T] -> cosines and sines float32 [2, T, 1, 1, H], once for all layers."""
        positions_TF = position_ids[self.axis, 0].T.float()
        angles_TF = positions_TF * self.inverse_frequency
        angles_TH = torch.cat((angles_TF, angles_TF), dim=-1)
        return (self.factor * torch.stack((angles_TH.cos(), angles_TH.sin())))[:, :, None, None, :]


class PackedSelfAttention(SelfAttention):
    """Megatron's self attention, whose queries, keys and values leave the joint projection normed, rotated and where
    attention reads them. Megatron computes cosine and sine again in every layer, for queries and for keys, and needs
    the packing on the host. Under context parallelism the projection's rows are exchanged for heads and attention's
    output for rows; what is between has all T tokens and A / cp query heads."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        queries, keys = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        eps = config.layernorm_epsilon if config.qk_layernorm else None
        cp, self._local_keys = config.context_parallel_size, keys
        self._heads = Heads(queries // cp, max(keys // cp, 1), self.hidden_size_per_attention_head, eps)
        self._cp_group = self.pg_collection.cp if cp > 1 else None

    def forward(self, hidden_T1D: Tensor, *, rotary_pos_emb: Tensor, packed_seq_params: Packing) -> Tensor:
        """[T, 1, D] -> the same. rotary_pos_emb: see Rotary."""
        packed, ops = packed_seq_params, layer_ops(hidden_T1D.device.type, hidden_T1D.dtype)
        mixed_TW = self.linear_qkv(hidden_T1D)[0].squeeze(1)
        if self._cp_group is not None:
            mixed_TW = tokens_for_heads(self._columns_of_ranks(mixed_TW, self._cp_group.size()), self._cp_group)
        norms = None if self._heads.eps is None else (self.q_layernorm.weight, self.k_layernorm.weight)
        q_TAH, k_SKH, v_SKH = ops.qkv(mixed_TW, norms, rotary_pos_emb[:, :, 0, 0], self._heads, packed.shared_keys)
        out_TAH = ops.attention(q_TAH, k_SKH, v_SKH, packed, self.core_attention.scale)
        out_TW = out_TAH.reshape(mixed_TW.shape[0], -1)
        if self._cp_group is not None:
            out_TW = heads_for_tokens(out_TW, self._cp_group)
        return self.linear_proj(out_TW[:, None])[0]

    def _columns_of_ranks(self, mixed_tW: Tensor, cp: int) -> Tensor:
        """[t, W] -> [t, cp, w]: the queries of each rank of the cp group with their key and value heads, of which
        several ranks get a copy where there are fewer than ranks."""
        if cp <= self._local_keys:
            return mixed_tW.view(len(mixed_tW), cp, -1)
        q_tKx, kv_tKx = mixed_tW.view(len(mixed_tW), self._local_keys, -1).tensor_split([-2 * self._heads.width], dim=2)
        copies = cp // self._local_keys
        kv_tcx = kv_tKx[:, :, None].expand(-1, -1, copies, -1).flatten(1, 2)
        return torch.cat((q_tKx.reshape(len(mixed_tW), cp, -1), kv_tcx), dim=2)


@dataclass
class Packing(PackedSeqParams):
    """Megatron's record of a packing, with additions.

    shared_keys   keys that segments share (PackedTokens.kv_index_K)
    runs          the packing as recurrent layers read it; None in a model that has none
    image_rows_I  rows of image tokens in this rank's share of T
    deepstack     layer number (Megatron's, from 1) -> features [I, 1, D] that are added to these rows after it
    routing       of a mixture of experts in training: the choices that are compared or replayed
    """

    shared_keys: SharedKeys | None = None
    runs: Runs | None = None
    image_rows_I: Tensor | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    routing: PassRouting | None = None


class PackedAttention(nn.Module):
    """The core-attention slot of Megatron's SelfAttention: the scale of its softmax."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_):
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)


class Layer(TransformerLayer):
    """Megatron's layer for this trainer's models: no dropout, no bias behind a linear layer, no inference. Each sum
    with the residual is one operation with the norm that follows it, also the next layer's; features of an image are
    added after the first layers (DeepStack)."""

    _next_norm: tuple[RMSNorm, ...] = ()
    """The norm that reads this layer's output, where it may be computed with it; no submodule."""
    _recompute_swiglu = False

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        mixture: Mixture | None = None,
        expert_layout: ExpertLayout | None = None,
        **kwargs,
    ):
        super().__init__(config, *args, **kwargs)
        if mixture is not None:
            assert expert_layout is not None
            self.mlp = MixtureOfExperts(config, mixture, expert_layout)
        if config.tensor_model_parallel_size == 1:  # spare an autograd function around each linear that does nothing
            for module in self.modules():
                if isinstance(module, ColumnParallelLinear):
                    module.disable_grad_reduce = True
                elif isinstance(module, RowParallelLinear):
                    module.explicit_expert_comm = True  # "others communicate"

    def forward(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor, packed_seq_params: Packing, **_
    ) -> tuple[Tensor, None]:
        normed_T1D = self.input_layernorm(hidden_states)
        out_T1D = self.self_attention(normed_T1D, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params)
        hidden_T1D, normed_T1D = self.pre_mlp_layernorm.of_sum(out_T1D, hidden_states)
        routing = packed_seq_params.routing
        choose = None if routing is None else partial(routing.choose, self.layer_number)
        if self.recompute_mlp and self.training:
            out_T1D = checkpoint(partial(self._feed_forward, choose=choose), False, normed_T1D)
        else:
            out_T1D = self._feed_forward(normed_T1D, choose=choose)
        features_I1D = packed_seq_params.deepstack.get(self.layer_number)
        if features_I1D is not None:
            return (hidden_T1D + out_T1D).index_add(0, packed_seq_params.image_rows_I, features_I1D), None
        if not self._next_norm:
            return hidden_T1D + out_T1D, None
        [norm] = self._next_norm
        hidden_T1D, normed_T1D = norm.of_sum(out_T1D, hidden_T1D)
        hidden_T1D.norm_ahead = norm, normed_T1D
        return hidden_T1D, None

    def _feed_forward(self, normed_T1D: Tensor, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        if isinstance(self.mlp, MixtureOfExperts):
            return self.mlp(normed_T1D, choose)
        gate_up_T12F, _ = self.mlp.linear_fc1(normed_T1D)
        activated_T1F = self.mlp.activation_func(gate_up_T12F)
        again = partial(self.mlp.activation_func, gate_up_T12F.detach())
        with saved_as(activated_T1F, again) if self._recompute_swiglu and self.training else nullcontext():
            return self.mlp.linear_fc2(activated_T1F)[0]


def recompute_swiglu(block: TransformerBlock) -> None:
    """Let the backward pass compute the MLPs' activations again from what they read: the cheapest recomputation, a
    third of what an MLP keeps for one elementwise pass."""
    for layer in block.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.experts.recompute_swiglu = True
        layer._recompute_swiglu = True


def join_norms(block: TransformerBlock) -> None:
    """Let every layer compute the norm behind it together with its own last sum: RMSNorm.forward finds the result on
    the tensor. Not where layers are recomputed from their inputs: each is a unit of its own then."""
    if block.config.recompute_granularity == "full":
        return
    norms = [layer.input_layernorm for layer in block.layers][1:]
    norms += [] if block.final_layernorm is None else [block.final_layernorm]
    for layer, norm in zip(block.layers, norms, strict=False):
        layer._next_norm = (norm,)
