"""config.json -> Architecture -> Megatron configuration, and the errors of unsupported checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from support import tiny
from vold.models.architecture import Architecture, transformer_config


def test_families_are_read_from_disk(tmp_path):
    qwen3 = Architecture.from_pretrained(tiny.save(tiny.qwen3(), tmp_path / "qwen3"))
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.tied) == (32, True, False, True)
    assert (qwen3.mrope_section, qwen3.vision, qwen3.rope_theta) == ((16, 0, 0), None, 1e6)
    llama = Architecture.from_pretrained(tiny.save(tiny.llama(), tmp_path / "llama"))
    assert (llama.model_type, llama.head_dim, llama.qk_norm, llama.qkv_bias, llama.tied) == (
        "llama",
        32,
        False,
        False,
        True,
    )
    vl = Architecture.from_pretrained(tiny.save(tiny.qwen2_5_vl(tied=False), tmp_path / "vl"))
    assert (vl.head_dim, vl.qk_norm, vl.qkv_bias, vl.tied) == (16, False, True, False)
    assert (vl.mrope_axes, vl.vision.image_token_id, vl.vision.merge_size) == (
        [0, 0, *[1] * 3, *[2] * 3],
        tiny.IMAGE_PAD,
        2,
    )
    vl = Architecture.from_pretrained(tiny.save(tiny.qwen3_vl(tied=False), tmp_path / "qwen3_vl"))
    assert (vl.head_dim, vl.qk_norm, vl.qkv_bias, vl.tied, vl.vision.deepstack_layers) == (32, True, False, False, 3)
    assert vl.mrope_axes == [*[0, 1, 2] * 5, 0]


def test_the_flat_config_of_the_hub_is_read(tmp_path):
    """Qwen2.5-VL checkpoints on the hub keep the text fields at the top level and the rope in `rope_scaling`."""
    text = {**tiny.TEXT, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"model_type": "qwen2_5_vl", **tiny.VISION}
    flat = {"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "vision_config": vision, **text}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    arch = Architecture.from_pretrained(tmp_path)
    expected = Architecture.from_config(tiny.qwen2_5_vl().config)
    assert replace(arch, vision=None) == replace(expected, vision=None)
    assert arch.vision.image_token_id == 151655


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(), "model_type 'mistral' is not supported: use one of llama, qwen2, qwen3, qwen2_5_vl"),
        (tiny.llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}).config, "'dynamic'"),
        (tiny.llama(rope_parameters={**tiny.ROPE, "partial_rotary_factor": 0.5}).config, "partial_rotary_factor 0.5"),
        (tiny.llama(attention_bias=True).config, "attention_bias"),
        (tiny.llama(mlp_bias=True).config, "mlp_bias"),
        (tiny.llama(hidden_act="gelu").config, "hidden_act 'gelu'"),
        (tiny.llama(attention_dropout=0.1).config, "attention_dropout 0.1"),
        (tiny.llama(sliding_window=64).config, "sliding_window to null"),
        (LlamaConfig(quantization_config={"quant_method": "fp8"}), "quantization_config is not supported"),
        (tiny.qwen2(hidden_act="relu").config, "hidden_act 'relu'"),
        (tiny.qwen2(use_sliding_window=True, max_window_layers=1).config, "sliding-window"),
        (tiny.qwen3(attention_bias=True).config, "attention_bias"),
    ],
)
def test_unsupported_models_are_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        Architecture.from_config(config, "student")
    assert str(error.value).startswith("student: ") and "\n" not in str(error.value)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Architecture.from_pretrained(tmp_path)


def test_sizes_that_the_layout_does_not_divide_are_refused(layout):
    arch = Architecture.from_config(tiny.qwen3().config)
    with pytest.raises(ValueError, match="tp=4 does not divide kv_heads=2"):
        transformer_config(arch, replace(layout, tp=4), torch.float32)
    with pytest.raises(ValueError, match="does not divide layers=2"):
        transformer_config(arch, replace(layout, pp=4), torch.float32)
