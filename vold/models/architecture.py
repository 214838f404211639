"""A model's architecture as its checkpoint's config.json describes it.

Supported: the families of vold.models.families. A field of config.json that would change the numbers and that the
layers here do not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vold.models.checkpoint_dir import lacks, reading
from vold.models.families import FAMILIES, Family

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
    shared      feed-forward width of one more, which every token goes to; 0: there is none
    """

    experts: int
    per_token: int
    ffn: int
    normalised: bool
    shared: int = 0


@dataclass(frozen=True)
class DeltaNet:
    """The gated delta nets in the place of some layers' attention.

    layers                   numbers of these layers, from 0
    key_heads, value_heads   each key head serves value_heads / key_heads of the others
    key_width, value_width   of a head
    window                   tokens that the convolution before it reads
    """

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    window: int


@dataclass(frozen=True)
class Architecture:
    """The shape of one model.

    ffn                feed-forward width; of one expert in a mixture
    vocab              rows of embedding and head, padding included
    rope_frequencies   radians a position of each pair of a head's rotated columns, float32, scaled as rope_type says
    rope_factor        multiplies cosines and sines (YaRN's attention factor)
    mrope_section      numbers of rotary frequencies for (temporal, height, width) positions; all temporal for text
    mrope_interleaved  the axes alternate over the frequencies (t h w t h w ... t t) instead of following each other
    tied               embedding and head share their weights
    mixture            the experts of each layer, or None for an MLP
    delta_net          of a family with gated delta nets; its attention has a gate at its output, its norms multiply by
                       1 + weight
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
    delta_net: DeltaNet | None = None

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
        rope = _supported_rope(text, origin, has_images=family.vision is not None)
        frequencies, factor = _rope_frequencies(text, rope, family.hybrid, origin)
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
            mrope_section=tuple(rope.get("mrope_section") or (len(frequencies), 0, 0)),
            mrope_interleaved=family.mrope_interleaved,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            max_positions=text.max_position_embeddings,
            vision=_vision_architecture(config),
            mixture=mixture,
            delta_net=_delta_net(text, origin) if family.hybrid else None,
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def is_delta_net(self, layer: int) -> bool:
        """layer: from 0"""
        return self.delta_net is not None and layer in self.delta_net.layers

    @property
    def attention_layers(self) -> int:
        """How many layers have keys and values."""
        return self.layers - (len(self.delta_net.layers) if self.delta_net else 0)

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
    step, dense = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", ())
    if step != 1 or dense:
        name, value = ("mlp_only_layers", dense) if dense else ("decoder_sparse_step", step)
        raise ValueError(
            f"{origin}: {name} {value} is not supported: use a checkpoint whose layers are all mixtures of experts"
        )
    experts, per_token = text.num_experts, text.num_experts_per_tok
    if not 1 <= per_token <= experts:
        raise ValueError(f"{origin}: num_experts_per_tok {per_token} is no number of {experts} experts: correct it")
    normalised = bool(getattr(text, "norm_topk_prob", True))
    if "_vl_" in text.model_type and not normalised:  # transformers normalises there whatever the field says
        raise ValueError(f"{origin}: norm_topk_prob False is not supported for {text.model_type}: set it to true")
    shared = getattr(text, "shared_expert_intermediate_size", 0)
    return Mixture(experts, per_token, text.moe_intermediate_size, normalised, shared)


def _supported_rope(text: PretrainedConfig, origin: str, *, has_images: bool) -> dict:
    """Rope parameters; ValueError for what the layers here do not compute."""
    rope = text.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "mrope", *SCALED_ROPES):
        supported = ", ".join(("default", *SCALED_ROPES))
        raise ValueError(
            f"{origin}: rope_type {rope_type!r} is not supported: use a checkpoint with one of {supported}"
        )
    if has_images and not rope.get("mrope_section"):
        raise ValueError(f"{origin}: rope parameters have no mrope_section: add the one of the original checkpoint")
    return rope


def _rope_frequencies(text: PretrainedConfig, rope: dict, partial: bool, origin: str) -> tuple[Tensor, float]:
    """(float32 [rotated columns / 2] on the CPU, factor of cosines and sines), as transformers computes them. partial:
    the family's attention may rotate a part of a head."""
    share = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None)) or 1.0
    if share != 1.0 and not partial:
        raise ValueError(f"{origin}: partial_rotary_factor {share} is not supported: use a checkpoint that rotates all")
    rope_type = rope.get("rope_type", "default")
    if rope_type in SCALED_ROPES:
        with reading(Path(origin)):
            return ROPE_INIT_FUNCTIONS[rope_type](text, device=torch.device("cpu"))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    columns = int(head_dim * share)
    exponent = torch.arange(0, columns, 2, dtype=torch.int64, device="cpu").float() / columns
    return 1.0 / (float(rope["rope_theta"]) ** exponent), 1.0


def _delta_net(text: PretrainedConfig, origin: str) -> DeltaNet:
    """ValueError for layers and numbers that make none."""
    if getattr(text, "attn_output_gate", True) is False:  # transformers has the gate whatever this says, vLLM has not
        raise ValueError(
            f"{origin}: attn_output_gate False is not supported: use a checkpoint with attn_output_gate True"
        )
    kinds = {"linear_attention", "full_attention"}
    if other := sorted({*text.layer_types} - kinds):
        raise ValueError(f"{origin}: layer_types has {other[0]!r}: use a checkpoint with {' and '.join(sorted(kinds))}")
    if len(text.layer_types) != text.num_hidden_layers:
        raise ValueError(
            f"{origin}: {len(text.layer_types)} layer_types for {text.num_hidden_layers} num_hidden_layers: correct one"
        )
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    if keys < 1 or values % keys:
        raise ValueError(
            f"{origin}: linear_num_key_heads {keys} does not divide linear_num_value_heads {values}: correct one"
        )
    layers = frozenset(number for number, kind in enumerate(text.layer_types) if kind == "linear_attention")
    widths = (text.linear_key_head_dim, text.linear_value_head_dim, text.linear_conv_kernel_dim)
    return DeltaNet(layers, keys, values, *widths)


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


def check_expert_sizes(ep: int, etp: int, *models: Architecture | None) -> None:
    """Raises ValueError where experts would be divided and none of the models has any."""
    if ep * etp > 1 and not any(model and model.mixture for model in models):
        names = " and ".join(model.model_type for model in models if model)
        raise ValueError(
            f"parallel.ep = {ep} and etp = {etp} divide a mixture's experts and {names} has none; leave both out"
        )
