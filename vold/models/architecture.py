"""A model's architecture as its checkpoint's config.json describes it, and the Megatron configuration that builds it.

Supported: the families of vold.models.families. A field of config.json that would change the numbers and that the
layers here do not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vold.models.checkpoint_dir import lacks, reading
from vold.models.families import FAMILIES, Family
from vold.parallel.launch import Layout

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)
# Frequencies that do not depend on the length of a sequence; transformers' own functions compute them.
SCALED_ROPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class VisionArchitecture:
    """A vision tower, as far as the language model depends on it.

    merge_size         side of the square of patches merged into a token
    tokens_per_second  of videos
    deepstack_layers   number of first decoder layers to whose output DeepStack adds image features
    tower_config       transformers' configuration of the tower
    """

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    merge_size: int
    tokens_per_second: int | None
    deepstack_layers: int
    tower_config: PretrainedConfig = field(repr=False, compare=False)


@dataclass(frozen=True)
class Mixture:
    """A layer's mixture of experts.

    experts     their number
    per_token   those that a token goes to
    ffn         feed-forward width of one
    normalised  the weights of a token's experts add up to 1
    """

    experts: int
    per_token: int
    ffn: int
    normalised: bool


@dataclass(frozen=True)
class Architecture:
    """The shape of one model.

    ffn                feed-forward width; of one expert in a mixture
    vocab              rows of embedding and head, padding included
    rope_frequencies   radians a position of each of the head_dim / 2 pairs, float32, scaled as rope_type says
    rope_factor        multiplies cosines and sines (YaRN's attention factor)
    mrope_section      numbers of rotary frequencies for (temporal, height, width) positions; all temporal for text
    mrope_interleaved  the axes alternate over the frequencies (t h w t h w ... t t) instead of following each other
    tied               embedding and head share their weights
    mixture            the experts of each layer, or None for an MLP
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_eps: float
    rope_theta: float
    rope_frequencies: tuple[float, ...] = field(repr=False)
    rope_factor: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    vision: VisionArchitecture | None = None
    mixture: Mixture | None = None

    @classmethod
    def from_pretrained(cls, checkpoint_dir: str | Path) -> Architecture:
        """Read a checkpoint directory's config.json. Raises ValueError for an unsupported model."""
        path = Path(checkpoint_dir)
        if not (path / "config.json").is_file():
            raise lacks(path, "config.json")
        with reading(path):
            return cls.from_config(AutoConfig.from_pretrained(path, local_files_only=True), str(path))

    @classmethod
    def from_config(cls, config: PretrainedConfig, origin: str = "config") -> Architecture:
        """From transformers' configuration; `origin` names it in error lines."""
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            supported = ", ".join(SUPPORTED_MODEL_TYPES)
            raise ValueError(f"{origin}: model_type {config.model_type!r} is not supported: use one of {supported}")
        family, text = FAMILIES[config.model_type], config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        _check_computed(config, text, origin)
        mixture = _mixture(text, origin) if family.experts else None
        rope = _supported_rope(text, origin)
        frequencies, factor = _rope_frequencies(text, rope, head_dim, origin)
        return cls(
            model_type=config.model_type,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            ffn=text.intermediate_size if mixture is None else mixture.ffn,
            vocab=text.vocab_size,
            rms_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            rope_frequencies=tuple(frequencies.tolist()),
            rope_factor=factor,
            mrope_section=tuple(rope.get("mrope_section") or (head_dim // 2, 0, 0)),
            mrope_interleaved=family.mrope_interleaved,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            max_positions=text.max_position_embeddings,
            vision=_vision_architecture(config),
            mixture=mixture,
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def mrope_axes(self) -> list[int]:
        """For each rotary frequency the axis (0 temporal, 1 height, 2 width) whose position it rotates by."""
        axes = [axis for axis, count in enumerate(self.mrope_section) for _ in range(count)]
        if self.mrope_interleaved:
            axes = [0] * len(axes)
            for axis in (1, 2):
                stop = 3 * self.mrope_section[axis]
                axes[axis:stop:3] = [axis] * len(axes[axis:stop:3])
        return axes


# Fields that would change the numbers, with the values that the layers here compute. Absent counts as the first.
_COMPUTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "embd_pdrop": (0.0, None),
    "resid_pdrop": (0.0, None),
    "quantization_config": (None,),
}


def _check_computed(config: PretrainedConfig, text: PretrainedConfig, origin: str) -> None:
    """ValueError that names a field of config.json whose value the layers here do not compute."""
    for name, values in _COMPUTED.items():
        value = getattr(text, name, None) or getattr(config, name, None) or values[0]
        if value not in values:
            shown = "is" if isinstance(value, dict) else f"{value!r} is"
            raise ValueError(f"{origin}: {name} {shown} not supported: use a checkpoint with {name} {values[0]}")
    by_layer = getattr(text, "layer_types", None)  # Qwen's; where there is none, a window is every layer's
    window = getattr(text, "sliding_window", None) if by_layer is None else None
    if window is not None or "sliding_attention" in (by_layer or ()):
        fix = "set use_sliding_window to false" if window is None else "set sliding_window to null"
        raise ValueError(f"{origin}: sliding-window attention is not supported: {fix}")


def _mixture(text: PretrainedConfig, origin: str) -> Mixture:
    """ValueError for a model whose layers are not all mixtures, and for numbers that make none."""
    if text.decoder_sparse_step != 1 or text.mlp_only_layers:
        name = "mlp_only_layers" if text.mlp_only_layers else "decoder_sparse_step"
        value = getattr(text, name)
        raise ValueError(
            f"{origin}: {name} {value} is not supported: use a checkpoint whose layers are all mixtures of experts"
        )
    experts, per_token = text.num_experts, text.num_experts_per_tok
    if not 1 <= per_token <= experts:
        raise ValueError(f"{origin}: num_experts_per_tok {per_token} is no number of {experts} experts: correct it")
    normalised = bool(getattr(text, "norm_topk_prob", True))
    if "_vl_" in text.model_type and not normalised:  # transformers normalises there whatever the field says
        raise ValueError(f"{origin}: norm_topk_prob False is not supported for {text.model_type}: set it to true")
    return Mixture(experts, per_token, text.moe_intermediate_size, normalised)


def _supported_rope(text: PretrainedConfig, origin: str) -> dict:
    """Rope parameters; ValueError for what the layers here do not compute."""
    rope = text.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "mrope", *SCALED_ROPES):
        supported = ", ".join(("default", *SCALED_ROPES))
        raise ValueError(
            f"{origin}: rope_type {rope_type!r} is not supported: use a checkpoint with one of {supported}"
        )
    if "_vl_" in text.model_type and not rope.get("mrope_section"):
        raise ValueError(f"{origin}: rope parameters have no mrope_section: add the one of the original checkpoint")
    return rope


def _rope_frequencies(text: PretrainedConfig, rope: dict, head_dim: int, origin: str) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] on the CPU, factor of cosines and sines), as transformers computes them."""
    share = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None)) or 1.0
    if share != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor {share} is not supported: use a checkpoint that rotates all")
    rope_type = rope.get("rope_type", "default")
    if rope_type in SCALED_ROPES:
        with reading(Path(origin)):
            return ROPE_INIT_FUNCTIONS[rope_type](text, device=torch.device("cpu"))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return 1.0 / (float(rope["rope_theta"]) ** exponent), 1.0


def check_adapters(arch: Architecture, targets: Sequence[str] = ()) -> None:
    """Raises ValueError for an architecture whose files join projections: peft's adapter has one A for all of them; and
    for targets that would be experts."""
    if not arch.family.adapters:
        raise ValueError(f"adapter is not supported for {arch.model_type}: leave it out, or train another student")
    experts = [target for target in targets if target in ("fc1", "fc2")]
    if arch.mixture is not None and experts:
        raise ValueError(
            f"adapter.targets has {', '.join(experts)}, which {arch.model_type} has as experts: use qkv and proj"
        )


def _vision_architecture(config: PretrainedConfig) -> VisionArchitecture | None:
    if not hasattr(config, "vision_config"):
        return None
    return VisionArchitecture(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        merge_size=config.vision_config.spatial_merge_size,
        tokens_per_second=getattr(config.vision_config, "tokens_per_second", None),
        deepstack_layers=len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
        tower_config=config.vision_config,
    )


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


def check_expert_sizes(ep: int, etp: int, *models: Architecture | None) -> None:
    """Raises ValueError where experts would be divided and none of the models has any."""
    if ep * etp > 1 and not any(model and model.mixture for model in models):
        names = " and ".join(model.model_type for model in models if model)
        raise ValueError(
            f"parallel.ep = {ep} and etp = {etp} divide a mixture's experts and {names} has none; leave both out"
        )


def _check_mixture_divides(mixture: Mixture, layout: Layout) -> None:
    if mixture.experts % layout.experts.ep:
        raise ValueError(f"ep={layout.experts.ep} does not divide experts={mixture.experts}: choose an ep that does")
    if mixture.ffn % layout.experts.etp:
        raise ValueError(
            f"etp={layout.experts.etp} does not divide the experts' ffn={mixture.ffn}: choose an etp that does"
        )
    if layout.tp > 1 and not layout.sp:
        raise ValueError(f"tp={layout.tp} without sp would send each token to its experts {layout.tp} times: set sp")
