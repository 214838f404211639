"""config.json -> Architecture -> Megatron configuration, and the errors of unsupported checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import CohereConfig, LlamaConfig, MistralConfig

from support import tiny
from vold.models.architecture import Architecture
from vold.models.megatron_config import transformer_config


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


LLAMA = {"model_type": "llama", **tiny.TEXT, "num_attention_heads": 4, "rope_theta": 5e5}
HUB_LLAMAS = {  # how rope and heads stand in config.json of Llama 2, deepseek-coder and Llama 3.2, written before 2026
    "llama 2": ({"rope_theta": None, "num_key_value_heads": None, "pretraining_tp": 1, "rope_scaling": None}, 1e4, 1.0),
    "deepseek-coder": ({"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1e5, 0.25),
    "llama 3.2": (
        {
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
        5e5,
        1.0,
    ),
}


@pytest.mark.parametrize("name", HUB_LLAMAS)
def test_llama_configs_of_the_hub_are_read(name, tmp_path):
    changes, theta, fastest = HUB_LLAMAS[name]
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = Architecture.from_pretrained(tmp_path)
    assert (arch.rope_theta, arch.rope_factor, len(arch.rope_frequencies)) == (theta, 1.0, arch.head_dim // 2)
    assert arch.rope_frequencies[0] == fastest and arch.kv_heads == config.get("num_key_value_heads", 4)
    slowest = theta ** -(1 - 2 / arch.head_dim)
    assert arch.rope_frequencies[-1] == pytest.approx(slowest * {"llama 2": 1, "llama 3.2": 1 / 32}.get(name, fastest))


def recurrent(**changes):
    """A Qwen3.5's configuration, of which transformers might make no model."""
    config = tiny.qwen3_5_text().config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CohereConfig(),
            "model_type 'cohere' is not supported: use one of llama, mistral, phi3, qwen2",
        ),
        (tiny.llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}).config, "'dynamic'"),
        (tiny.llama(rope_parameters={**tiny.ROPE, "partial_rotary_factor": 0.5}).config, "partial_rotary_factor 0.5"),
        (tiny.llama(attention_bias=True).config, "attention_bias"),
        (tiny.llama(mlp_bias=True).config, "mlp_bias"),
        (tiny.llama(hidden_act="gelu").config, "hidden_act 'gelu'"),
        (tiny.llama(attention_dropout=0.1).config, "attention_dropout 0.1"),
        (tiny.llama(sliding_window=64).config, "sliding_window to null"),
        (LlamaConfig(quantization_config={"quant_method": "fp8"}), "quantization_config is not supported"),
        (MistralConfig(), "sliding_window to null"),  # 7B v0.1 attends to 4096 tokens
        (tiny.phi3(sliding_window=64).config, "sliding_window to null"),
        (tiny.phi3(resid_pdrop=0.1).config, "resid_pdrop 0.1"),
        (tiny.phi3(rope_parameters={**tiny.ROPE, "partial_rotary_factor": 0.5}).config, "partial_rotary_factor 0.5"),
        (tiny.qwen2(hidden_act="relu").config, "hidden_act 'relu'"),
        (tiny.qwen2(use_sliding_window=True, max_window_layers=1).config, "sliding-window"),
        (tiny.qwen3(attention_bias=True).config, "attention_bias"),
        (recurrent(attn_output_gate=False), "attn_output_gate False"),
        (recurrent(linear_num_value_heads=3), "linear_num_key_heads 2 does not divide"),
        (recurrent(layer_types=["conv", *["full_attention"] * 3]), "layer_types has 'conv'"),
        (recurrent(layer_types=["full_attention"] * 3), "3 layer_types for 4 num_hidden_layers"),
        (recurrent(rope_parameters={**tiny.ROPE, "rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
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
    recurrent = Architecture.from_config(tiny.qwen3_5_text(num_key_value_heads=4).config)
    with pytest.raises(ValueError, match=r"cp=2 is not supported for qwen3_5_text: .* set cp to 1"):
        transformer_config(recurrent, replace(layout, cp=2), torch.float32)
    with pytest.raises(ValueError, match="tp=4 does not divide linear_num_key_heads=2"):
        transformer_config(recurrent, replace(layout, tp=4, sp=True), torch.float32)


def test_recurrent_layers_are_read_from_config():
    arch = Architecture.from_config(tiny.qwen3_5_text().config)
    assert (arch.delta_net.layers, arch.attention_layers, arch.is_delta_net(3)) == ({0, 1, 2}, 1, False)
    assert (len(arch.rope_frequencies), arch.mrope_axes) == (4, [0, 1, 2, 0]), "a quarter of 32 columns, in pairs"
