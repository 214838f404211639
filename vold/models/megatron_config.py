"""Megatron's configuration of an architecture on a layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from vold.models.architecture import Architecture, DeltaNet, Mixture
from vold.parallel.launch import Layout


def transformer_config(arch: Architecture, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of this architecture on this layout. Raises ValueError where a size does not divide."""
    _check_divides(arch, layout)
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # "the layer spec brings the activation module": ours, see layers.SwiGLU
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        attention_output_gate=arch.delta_net is not None,
        qk_layernorm=arch.qk_norm,
        mrope_section=list(arch.mrope_section),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        **_parallel_flags(layout),
        **_RECOMPUTE_FLAGS[layout.recompute],
        **_PLAIN_TORCH_FLAGS,
    )


# Fused kernels of apex and TransformerEngine, which this trainer does not use.
_PLAIN_TORCH_FLAGS = {
    "use_cpu_initialization": True,
    "perform_initialization": False,  # every weight comes from a checkpoint
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}

_RECOMPUTE_FLAGS = {
    "none": {},
    "swiglu": {},  # layers.recompute_swiglu
    # The MLPs, whose activations are the largest. (Flash attention recomputes its scores anyway, and Megatron's
    # recomputation of norms needs TransformerEngine.)
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    # Every layer from its input.
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _parallel_flags(layout: Layout) -> dict:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "sequence_parallel": layout.sp,
        "context_parallel_size": layout.cp,
        # Packed micro-batches differ in length; Megatron accepts that only with this dispatcher, dense models too.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "batch_p2p_sync": False,
        # With gloo, sends are not finished when the schedule frees the sent tensor: interleaved runs went wrong.
        "deallocate_pipeline_outputs": layout.device.type == "cuda",
    }


def _check_divides(arch: Architecture, layout: Layout) -> None:
    if arch.mixture is not None:
        _check_mixture_divides(arch.mixture, layout)
    if arch.delta_net is not None:
        _check_delta_net_divides(arch.model_type, arch.delta_net, layout)
    sizes = {"heads": arch.heads, "kv_heads": arch.kv_heads, "vocab": arch.vocab}
    sizes |= {"ffn": arch.ffn} if arch.mixture is None else {}
    for name, size in sizes.items():
        if size % layout.tp:
            raise ValueError(f"tp={layout.tp} does not divide {name}={size} of this model: choose a tp that does")
    queries, keys = arch.heads // layout.tp, arch.kv_heads // layout.tp
    if queries % layout.cp or (keys % layout.cp and layout.cp % keys):
        raise ValueError(
            f"cp={layout.cp} must divide the {queries} query heads of a rank (heads={arch.heads} / tp={layout.tp}) and "
            f"divide, or be a multiple of, its {keys} key heads (kv_heads={arch.kv_heads}): choose a cp that does"
        )
    stages = layout.pp * (layout.vpp or 1)
    if arch.layers % stages:
        raise ValueError(
            f"pp={layout.pp} x vpp={layout.vpp or 1} does not divide layers={arch.layers}: lower pp or vpp"
        )


def _check_mixture_divides(mixture: Mixture, layout: Layout) -> None:
    if mixture.experts % layout.experts.ep:
        raise ValueError(f"ep={layout.experts.ep} does not divide experts={mixture.experts}: choose an ep that does")
    if mixture.shared % layout.tp:
        shared = f"the shared expert's ffn={mixture.shared}"
        raise ValueError(f"tp={layout.tp} does not divide {shared}: choose a tp that does")
    if mixture.ffn % layout.experts.etp:
        raise ValueError(
            f"etp={layout.experts.etp} does not divide the experts' ffn={mixture.ffn}: choose an etp that does"
        )
    if layout.tp > 1 and not layout.sp:
        raise ValueError(f"tp={layout.tp} without sp would send each token to its experts {layout.tp} times: set sp")


def _check_delta_net_divides(model_type: str, shape: DeltaNet, layout: Layout) -> None:
    if layout.cp > 1:
        raise ValueError(
            f"cp={layout.cp} is not supported for {model_type}: its gated delta nets read tokens in order; set cp to 1"
        )
    for name, heads in (("linear_num_key_heads", shape.key_heads), ("linear_num_value_heads", shape.value_heads)):
        if heads % layout.tp:
            raise ValueError(f"tp={layout.tp} does not divide {name}={heads} of this model: choose a tp that does")
