"""Published configurations, as transformers' keyword arguments (each model's config.json on its page)."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen3Config

ROPE = {"rope_type": "default", "rope_theta": 1e6}
REAL_IDS = 151669  # of the 151,936 rows: what the tokenizers of both families know

QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rope_parameters": ROPE}
QWEN3 |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
QWEN3_1_7B = QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
QWEN2_5_VL_3B = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
        "rope_parameters": ROPE | {"mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 2048,
        "tokens_per_second": 2,
    },
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
}
MODELS = {
    "qwen3-1.7b": (Qwen3Config, QWEN3_1_7B, 1_720_574_976),
    "qwen3-8b": (Qwen3Config, QWEN3_8B, 8_190_735_360),
    "qwen2.5-vl-3b": (Qwen2_5_VLConfig, QWEN2_5_VL_3B, 3_085_938_688),
}
"""Name -> class, its arguments, and the parameters of the language model."""


def config_of(name: str, layers: int | None = None, blocks: int | None = None) -> PretrainedConfig:
    """layers, blocks: of the text model and of the vision tower, fewer than published; the first ones are kept."""
    config_type, arguments, _ = MODELS[name]
    config = config_type(**arguments)
    text = config.get_text_config()
    text.num_hidden_layers = layers or text.num_hidden_layers
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    if blocks is not None:
        config.vision_config.depth = blocks
        config.vision_config.fullatt_block_indexes = [
            block for block in config.vision_config.fullatt_block_indexes if block < blocks
        ]
    return config


def save_config(name: str, folder: Path, layers: int | None = None, blocks: int | None = None) -> Path:
    """A checkpoint directory with config.json alone."""
    directory = folder / name
    config_of(name, layers, blocks).save_pretrained(directory)
    return directory
