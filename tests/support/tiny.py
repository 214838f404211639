"""Tiny random checkpoints with the same config fields, tensor names and files as the real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import short_name
from vold.models.images import image_grids
from vold.models.joined import parts_of
from vold.models.positions import expand_image_tokens, mrope_positions, text_positions
from vold.models.weight_rules import Rule, join_pieces, named_rules, sharing_of
from vold.parallel.launch import Layout
from vold.types import PackedTokens, Picture

VOCAB = 128
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 120, 121, 122, 123
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    attention_dropout=0.0,
)
ROPE = {"rope_type": "default", "rope_theta": 1e6}
VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=4,
    window_size=16,
    out_hidden_size=64,
    fullatt_block_indexes=[1],
)
VISION_QWEN3 = dict(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0, 1, 2],
)
PATCH_VALUES = 3 * 2 * 4 * 4  # channels x temporal patch x patch x patch
SPECIAL_IDS = dict(
    image_token_id=IMAGE_PAD,
    video_token_id=VIDEO_PAD,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
)


def qwen3(tied: bool = True, **changes) -> Qwen3ForCausalLM:
    config = Qwen3Config(**{**TEXT, "head_dim": 32, "rope_parameters": ROPE, "tie_word_embeddings": tied, **changes})
    return perturbed(Qwen3ForCausalLM, config)


def llama(tied: bool = True, **changes) -> LlamaForCausalLM:
    config = LlamaConfig(**{**TEXT, "head_dim": 32, "rope_parameters": ROPE, "tie_word_embeddings": tied, **changes})
    return perturbed(LlamaForCausalLM, config)


def qwen2(tied: bool = False, **changes) -> Qwen2ForCausalLM:
    config = Qwen2Config(**{**TEXT, "rope_parameters": ROPE, "tie_word_embeddings": tied, **changes})
    return perturbed(Qwen2ForCausalLM, config)


def qwen2_5_vl(tied: bool = True, **changes) -> Qwen2_5_VLForConditionalGeneration:
    text = {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}, **changes}
    text |= {"bos_token_id": None, "eos_token_id": VOCAB - 1}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=dict(VISION), tie_word_embeddings=tied, **SPECIAL_IDS)
    return perturbed(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(tied: bool = True, **changes) -> Qwen3VLForConditionalGeneration:
    """Four layers: DeepStack adds to three of them, and the last reads them all."""
    rope = {**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 32, "rope_parameters": rope, **changes}
    config = Qwen3VLConfig(text_config=text, vision_config=dict(VISION_QWEN3), tie_word_embeddings=tied, **SPECIAL_IDS)
    return perturbed(Qwen3VLForConditionalGeneration, config)


def perturbed(cls, config, seed: int = 0):
    """A float32 model whose norms and biases are not trivial and whose logits are not flat."""
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("A_log"):
                parameter.sub_(4)  # a state that outlives its prompt
            else:
                parameter.mul_(3)
    return model


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def mistral(tied: bool = True, **changes) -> MistralForCausalLM:
    """Heads that are wider together than the hidden states, as in Nemo and Small."""
    text = {**TEXT, "head_dim": 24, "rope_parameters": ROPE, "sliding_window": None}
    return perturbed(MistralForCausalLM, MistralConfig(**{**text, "tie_word_embeddings": tied, **changes}))


def phi3(tied: bool = True, **changes) -> Phi3ForCausalLM:
    config = Phi3Config(
        **{**TEXT, "rope_parameters": ROPE, "pad_token_id": None, "tie_word_embeddings": tied, **changes}
    )
    return perturbed(Phi3ForCausalLM, config)


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def qwen3_moe(tied: bool = False, **changes) -> Qwen3MoeForCausalLM:
    text = {**TEXT, **MIXTURE, "head_dim": 32, "rope_parameters": ROPE, "tie_word_embeddings": tied}
    return perturbed(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**text, **changes}))


def qwen3_vl_moe(tied: bool = False, **changes) -> Qwen3VLMoeForConditionalGeneration:
    """Four layers, as qwen3_vl."""
    rope = {**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**TEXT, **MIXTURE, "num_hidden_layers": 4, "head_dim": 32, "rope_parameters": rope, **changes}
    vision = dict(VISION_QWEN3)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **SPECIAL_IDS)
    return perturbed(Qwen3VLMoeForConditionalGeneration, config)


DELTA_NET = dict(
    head_dim=32,
    num_hidden_layers=4,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    rope_parameters={**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
)


def qwen3_5_text(tied: bool = False, **changes) -> Qwen3_5ForCausalLM:
    """Three gated delta nets, then attention."""
    return perturbed(
        Qwen3_5ForCausalLM, Qwen3_5TextConfig(**{**TEXT, **DELTA_NET, "tie_word_embeddings": tied, **changes})
    )


def qwen3_5(tied: bool = False, **changes) -> Qwen3_5ForConditionalGeneration:
    vision = {key: value for key, value in VISION_QWEN3.items() if key != "deepstack_visual_indexes"}
    text = {**TEXT, **DELTA_NET, **changes}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **SPECIAL_IDS)
    return perturbed(Qwen3_5ForConditionalGeneration, config)


DELTA_MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA_MIXTURE |= {"shared_expert_intermediate_size": 40}


def qwen3_5_moe_text(tied: bool = False, **changes) -> Qwen3_5MoeForCausalLM:
    text = {**TEXT, **DELTA_NET, **DELTA_MIXTURE, "tie_word_embeddings": tied, **changes}
    return perturbed(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**text))


def qwen3_5_moe(tied: bool = False, **changes) -> Qwen3_5MoeForConditionalGeneration:
    vision = {key: value for key, value in VISION_QWEN3.items() if key != "deepstack_visual_indexes"}
    text = {**TEXT, **DELTA_NET, **DELTA_MIXTURE, **changes}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **SPECIAL_IDS)
    return perturbed(Qwen3_5MoeForConditionalGeneration, config)


FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen3": qwen3,
    "qwen2": qwen2,
    "qwen3_moe": qwen3_moe,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}


@dataclass(frozen=True)
class Row:
    """One sequence with its images, in the form transformers' forward takes it."""

    ids: Tensor
    positions_3L: Tensor
    pictures: tuple[Picture, ...] = ()

    def logits(self, reference) -> Tensor:
        images = {}
        if self.pictures:
            is_image = (self.ids == IMAGE_PAD).int()[None]
            pixels = torch.cat([picture.pixel_values for picture in self.pictures])
            images = dict(pixel_values=pixels, image_grid_thw=image_grids(self.pictures), mm_token_type_ids=is_image)
        return reference(self.ids[None], **images).logits[0]


def text_row(length: int, seed: int = 1) -> Row:
    ids = torch.randint(0, IMAGE_PAD, (length,), generator=torch.Generator().manual_seed(seed))
    return Row(ids, text_positions(length))


def image_row(arch: Architecture, *grids: tuple[int, int, int], seed: int = 1) -> Row:
    """Text, then each image between vision marks, with text between and after."""
    generator = torch.Generator().manual_seed(seed)
    pictures = tuple(
        Picture(f"{seed}/{number}", torch.randn(math.prod(grid), PATCH_VALUES, generator=generator), grid)
        for number, grid in enumerate(grids)
    )
    grid = image_grids(pictures)
    ids = [1, 2, *(t for _ in grids for t in (5, VISION_START, IMAGE_PAD, VISION_END, 7)), 8, 9, 10]
    ids = torch.tensor(expand_image_tokens(ids, grid, arch))
    return Row(ids, mrope_positions(ids, grid, arch), pictures)


def pack(rows: list[Row]) -> PackedTokens:
    cu_seqlens = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0).int()
    return PackedTokens(
        input_ids_T=torch.cat([row.ids for row in rows]),
        position_ids_3T=torch.cat([row.positions_3L for row in rows], dim=1),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        pictures=tuple(picture for row in rows for picture in row.pictures),
    )


def worst_gradient_error(model, reference) -> tuple[float, str]:
    """Largest difference to transformers' gradients, relative to each parameter's largest one, and its name."""
    expected = {short_name(name): p.grad for name, p in reference.named_parameters()}
    for name in list(expected):
        expected |= {part: rows_of(_Stored(expected[name]))[:] for part, rows_of in parts_of(name, model.arch).items()}
    worst = (0.0, "")
    for name, parameter, rule in named_rules(model):
        pieces = [_share(expected[short], rule, model.layout) for short in rule.names]
        wanted = join_pieces(rule, pieces, model.arch)
        error = (parameter.grad - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
        worst = max(worst, (error.item(), name))
    return worst


def _share(tensor: Tensor, rule: Rule, layout: Layout) -> Tensor:
    sharing = sharing_of(rule, layout)
    return tensor if rule.split is None else tensor.chunk(sharing.ranks, rule.split)[sharing.rank]


class _Stored:
    """A tensor as a safetensors slice."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return [*self._tensor.shape]

    def __getitem__(self, index) -> Tensor:
        return self._tensor[index]
