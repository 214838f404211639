"""The two tiny checkpoints' architectures: a Qwen3 text teacher and a Qwen2.5-VL student, of equal text size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vold.miniature import world
from vold.miniature.tokenizer import CLOSE, EOS, IMAGE, MODEL_VOCAB_SIZE, OPEN, PAD, TOKEN_ID, VIDEO, make_tokenizer

HIDDEN, HEADS, VISION_HIDDEN, VISION_DEPTH = 128, 4, 64, 2
ROPE_THETA = 100.0
"""Small, because contexts are short; with 1e6 the columns of a one-row image are hardly distinguishable."""
MROPE_SECTION = (2, 2, 12)
ENDINGS = {"pad_token_id": TOKEN_ID[PAD], "eos_token_id": TOKEN_ID[EOS], "bos_token_id": None}


def _text_settings() -> dict:
    return {
        "vocab_size": MODEL_VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        **ENDINGS,
    }


def teacher_config() -> Qwen3Config:
    """Config of the text teacher, 450 thousand parameters."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return Qwen3Config(**_text_settings(), head_dim=HIDDEN // HEADS, rope_parameters=rope)


def base_config() -> Qwen2_5_VLConfig:
    """Config of the base student, 710 thousand parameters, 257 thousand of them in the vision tower."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": list(MROPE_SECTION)}
    vision = {
        "depth": VISION_DEPTH,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": world.PATCH,
        "spatial_merge_size": world.MERGE,
        "temporal_patch_size": world.TEMPORAL,
        "window_size": world.CELL * 64,
        "fullatt_block_indexes": list(range(VISION_DEPTH)),
        "out_hidden_size": HIDDEN,
        "initializer_range": 0.05,
    }
    return Qwen2_5_VLConfig(
        text_config={**_text_settings(), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=TOKEN_ID[IMAGE],
        video_token_id=TOKEN_ID[VIDEO],
        vision_start_token_id=TOKEN_ID[OPEN],
        vision_end_token_id=TOKEN_ID[CLOSE],
        tie_word_embeddings=True,
    )


def new_model(config: Qwen3Config | Qwen2_5_VLConfig, seed: int) -> PreTrainedModel:
    """A freshly initialised float32 model that depends on `seed` alone."""
    cls = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else Qwen2_5_VLForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
    model.generation_config = GenerationConfig(do_sample=False, **ENDINGS)
    return model


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's image processor without torchvision; 28 × 196 images keep their size and give 7 merged tokens."""
    return Qwen2VLImageProcessorPil(
        min_pixels=world.CELL * world.CELL,
        max_pixels=world.CELL * world.CELL * 64,
        image_mean=[world.PIXEL_MEAN] * 3,
        image_std=[world.PIXEL_STD] * 3,
    )


def save_checkpoint(model: PreTrainedModel, directory: Path) -> None:
    """Save weights, config, generation config, tokenizer with chat template and the student's image processor."""
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if hasattr(model.config, "vision_config"):
        make_image_processor().save_pretrained(directory)
