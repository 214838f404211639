"""Our modules in Megatron's layer spec: RMSNorm, SwiGLU, rotary embedding, attention over packed sequences.

T packed tokens, A query heads, K key/value heads, H head width, F feed-forward width. Packing is the only input format:
Megatron calls it "thd". Megatron's own norm refuses sequence parallelism and its own attention refuses packing. The
functions behind each module are chosen in `vold.models.layer_ops`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from vold.models.architecture import Architecture
from vold.models.layer_ops import layer_ops


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the attribute by which Megatron sums the weight's gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return layer_ops(x.device.type, x.dtype).rms_norm(x, self.weight, self.eps)


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
    """Megatron's self attention with queries and keys rotated together, where they are made.

    Megatron rotates them one after the other, computes cosine and sine again for each and in every layer, and needs the
    packing on the host. Rotating outside the core attention also keeps an in-place kernel out of the part that
    selective recomputation runs twice.
    """

    def forward(self, hidden_states: Tensor, *args, rotary_pos_emb: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        self._cos_sin = rotary_pos_emb
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._cos_sin = None

    def get_query_key_value_tensors(self, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        q_T1AH, k_T1KH, v_T1KH = super().get_query_key_value_tensors(*args, **kwargs)
        cos_T11H, sin_T11H = self._cos_sin.to(q_T1AH.dtype)
        rope = layer_ops(q_T1AH.device.type, q_T1AH.dtype).rope
        return *rope(q_T1AH, k_T1KH, cos_T11H, sin_T11H), v_T1KH


@dataclass
class Packing(PackedSeqParams):
    """Megatron's record of a packing, with two additions.

    kv_index      keys that segments share (see PackedTokens)
    image_rows_I  rows of image tokens in this rank's share of T
    deepstack     layer number (Megatron's, from 1) -> features [I, 1, D] that are added to these rows after it
    """

    kv_index: Tensor | None = None
    image_rows_I: Tensor | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)


class PackedAttention(nn.Module):
    """Causal softmax attention inside each packed segment; the core-attention slot of Megatron's SelfAttention."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_):
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        q_TAH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packing,
        **_,
    ) -> Tensor:
        """Returns [T, A * H]."""
        keys_values = (k_TKH, v_TKH)
        if packed_seq_params.kv_index is not None:
            keys_values = (_gather(x, packed_seq_params.kv_index) for x in keys_values)
        attend = layer_ops(q_TAH.device.type, q_TAH.dtype).attention
        out_TAH = attend(q_TAH, *keys_values, packed_seq_params, self.scale)
        return out_TAH.reshape(q_TAH.shape[0], -1)


def _gather(x_TKH: Tensor, index: Tensor) -> Tensor:
    """Look up rows of x as an embedding does, whose backward adds a row's gradients up in a fixed order, on CUDA in
    fp32."""
    return F.embedding(index, x_TKH.flatten(1)).view(-1, *x_TKH.shape[1:])


class Layer(TransformerLayer):
    """Megatron's layer, followed by DeepStack in the first ones: features of an image are added at its tokens."""

    def forward(self, *args, packed_seq_params: Packing, **kwargs) -> tuple[Tensor, Tensor | None]:
        hidden_T1D, context = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        features_I1D = packed_seq_params.deepstack.get(self.layer_number)
        if features_I1D is not None:
            hidden_T1D = hidden_T1D.index_add(0, packed_seq_params.image_rows_I, features_I1D)
        return hidden_T1D, context


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This stage's layers and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config.qk_layernorm)] * layers, layer_norm=RMSNorm)


def layer_spec(qk_norm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(PackedSelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
