"""The modules of each layer of a stage, as Megatron's specification."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from vold.models.architecture import Architecture
from vold.models.delta_net import GatedDeltaNet
from vold.models.gated_attention import GatedSelfAttention
from vold.models.layers import Layer, PackedAttention, PackedSelfAttention, RMSNorm, SwiGLU, ZeroCentredRMSNorm
from vold.parallel.launch import Layout


def block_spec(
    config: TransformerConfig, arch: Architecture, layout: Layout, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This stage's layers and the final norm."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch, layout, number) for number in numbers], layer_norm=_norm(arch)
    )


def layer_spec(arch: Architecture, layout: Layout, number: int) -> ModuleSpec:
    """Of layer `number`, from 0."""
    norm = _norm(arch)
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        Layer,
        params={"mixture": arch.mixture, "expert_layout": layout.experts},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_mixer(arch, number),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(MLP, submodules=mlp) if arch.mixture is None else IdentityOp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mixer(arch: Architecture, number: int) -> ModuleSpec:
    """What reads across tokens: attention, or a gated delta net."""
    if arch.is_delta_net(number):
        return ModuleSpec(GatedDeltaNet, {"shape": arch.delta_net})
    head_norm = _norm(arch) if arch.qk_norm else IdentityOp
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    attention = PackedSelfAttention if arch.delta_net is None else GatedSelfAttention
    return ModuleSpec(attention, {"attn_mask_type": AttnMaskType.causal}, submodules)


def _norm(arch: Architecture) -> type[RMSNorm]:
    return RMSNorm if arch.delta_net is None else ZeroCentredRMSNorm
