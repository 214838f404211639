"""Our modules in Megatron's layer spec: RMSNorm, attention over packed sequences, rotary embedding.

T packed tokens, A query heads, K key/value heads, H head width, B sequences. Packing is the only input format: Megatron
calls it "thd". Megatron's own norm refuses sequence parallelism and its own attention refuses packing.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the mark by which Megatron sums the weight's gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class Rotary(nn.Module):
    """Angles of the rotary embedding for positions on three axes (temporal, height, width).

    Stands in for Megatron's MultimodalRotaryEmbedding: the same angles, but the inverse frequencies are computed on
    the CPU in float32, as transformers does, and multiplied elementwise, so that no matmul precision setting
    (TF32, autocast) can blur a position.
    """

    def __init__(self, head_dim: int, theta: float, section: tuple[int, int, int], device: torch.device):
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        # Plain attributes, not buffers: a later `.to(bfloat16)` of the model must not touch them.
        self.inverse_frequency = (1.0 / (theta**exponent)).to(device)
        self.axis = torch.tensor([axis for axis, count in enumerate(section) for _ in range(count)], device=device)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group=None) -> Tensor:
        """position_ids int64 [3, 1, T] -> angles float32 [T, 1, 1, H], in the layout Megatron's rope expects."""
        positions_TF = position_ids[self.axis, 0].T.float()
        angles_TF = positions_TF * self.inverse_frequency
        return torch.cat((angles_TF, angles_TF), dim=-1)[:, None, None, :]


class PackedAttention(nn.Module):
    """Causal softmax attention inside each packed sequence; the core-attention slot of Megatron's SelfAttention."""

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
        packed_seq_params: PackedSeqParams,
        **_,
    ) -> Tensor:
        """Returns [T, A * H]."""
        attend = _attention_for(q_TAH.device.type, q_TAH.dtype)
        out_TAH = attend(
            q_TAH, k_TKH, v_TKH, packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q, self.scale
        )
        return out_TAH.reshape(q_TAH.shape[0], -1)


@cache
def _attention_for(device: str, dtype: torch.dtype):
    """The fastest implementation this machine has for a device and dtype; SDPA is the one that runs anywhere."""
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return attend_sdpa
    return attend_flash if importlib.util.find_spec("flash_attn") else attend_torch_varlen


def attend_sdpa(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    """One scaled_dot_product_attention per sequence."""
    lengths = cu_seqlens.diff().tolist()
    parts = [x.split(lengths) for x in (q_TAH, k_TKH, v_TKH)]
    outs = []
    for q, k, v in zip(*parts, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def attend_flash(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_TAH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
    )


def attend_torch_varlen(q_TAH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float):
    """torch.nn.attention.varlen; key and value heads are repeated, as not every torch since 2.11 takes fewer."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TAH.shape[1] // k_TKH.shape[1]
    k_TAH, v_TAH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    return varlen_attn(
        q_TAH, k_TAH, v_TAH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0)
    )


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
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
