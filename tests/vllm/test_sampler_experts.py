"""Mixtures of experts in VllmSampler beside TransformersSampler, before and after weights arrive. In a file, and so a
process, of their own: vLLM makes its groups of experts for the first engine of a process or never."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from test_sampler import agree_after_every_sync, make_prompts, open_pair

pytestmark = pytest.mark.vllm

MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}


def mixture_dir(dense: Path, target: Path) -> Path:
    """An untrained mixture of experts, otherwise as the dense checkpoint; of Qwen3-VL in the published layout."""
    settings = json.loads((dense / "config.json").read_text())
    shutil.copytree(dense, target)
    torch.manual_seed(0)
    if settings["model_type"] == "qwen3":
        settings = {k: v for k, v in settings.items() if k not in ("model_type", "architectures", "layer_types")}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **MIXTURE)).save_pretrained(target)
        return target
    text = settings.pop("text_config") | MIXTURE | {"model_type": "qwen3_vl_moe_text"}
    vision = settings.pop("vision_config") | {"model_type": "qwen3_vl_moe_vision"}
    ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(target)
    tensors = {name: t for name, t in load_file(target / "model.safetensors").items() if ".experts." not in name}
    experts = {name: t for name, t in model.state_dict().items() if ".experts." in name}
    tensors |= {name: t.transpose(1, 2).contiguous() for name, t in experts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dense", ["tiny_teacher_dir", "tiny_qwen3_vl_dir"])
def test_mixtures_of_experts_draw_alike_before_and_after_weights_arrive(dense, request, layout, tmp_path):
    checkpoint = mixture_dir(request.getfixturevalue(dense), tmp_path / "mixture")
    pair, prompts = open_pair(checkpoint), make_prompts(checkpoint, tmp_path, size=(192, 32))
    prompts = prompts if "vl" in dense else prompts[:2]
    agree_after_every_sync(pair, prompts, checkpoint)
