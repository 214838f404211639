"""The architectures that the trainer computes, as data: one `Family` for each model_type of config.json.

A dense text model is one entry here: what sets it apart from a Llama, and how its files join a layer's projections.
Configuration, weight rules, plan, FLOPs, shards and exports follow from the entry; docs/architectures.md is its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionFamily:
    """Classes in transformers, "module.Class" below transformers.models: the tower, and the model whose positions it
    uses."""

    tower: str
    positions: str


@dataclass(frozen=True)
class Family:
    """One architecture.

    qkv_bias           biases of the query, key and value projections
    qk_norm            a norm of each query and key head
    mrope_interleaved  see vold.models.architecture.Architecture
    vision             its vision tower, or None for a text model
    experts            a mixture of experts in the place of each layer's MLP, beside a shared one where config.json has
                       its size
    hybrid             Qwen3.5's layers: gated delta nets in the place of some layers' attention, a gate at the output
                       of the others', whose heads rotate in part, and norms that multiply by 1 + weight
    left_out           beginnings of the names of tensors that transformers leaves out, and so does the trainer
    joined             tensors that the files hold as one, by their name in a layer: the names of the parts, in the
                       order of the rows, as they stand in a Llama's files
    gguf               the name that llama.cpp gives it, or None: such a file is not read
    """

    model_type: str
    title: str
    qkv_bias: bool = False
    qk_norm: bool = False
    mrope_interleaved: bool = False
    vision: VisionFamily | None = None
    experts: bool = False
    hybrid: bool = False
    left_out: tuple[str, ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf: str | None = None

    @property
    def adapters(self) -> bool:
        """LoRA: each projection has its own A, which the parts of a joined one would share."""
        return not self.joined


QWEN2_5_VISION = VisionFamily(
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel",
)
QWEN3_VISION = VisionFamily("qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel", "qwen3_vl.modeling_qwen3_vl.Qwen3VLModel")
QWEN3_MOE_VISION = VisionFamily(
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel", "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeModel"
)
QWEN3_5_VISION = VisionFamily("qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel", "qwen3_5.modeling_qwen3_5.Qwen3_5Model")
QWEN3_5_MOE_VISION = VisionFamily(
    "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel", "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeModel"
)
PHI_JOINED = {
    "self_attn.qkv_proj.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
DELTA_NET_JOINED = {
    "linear_attn.in_proj_qkv.weight": tuple(f"linear_attn.in_proj_{x}.weight" for x in "qkv"),
    "linear_attn.conv1d.weight": tuple(f"linear_attn.conv1d_{x}.weight" for x in "qkv"),
}
QWEN3_5 = {
    "qk_norm": True,
    "mrope_interleaved": True,
    "hybrid": True,
    "left_out": ("mtp.",),
    "joined": DELTA_NET_JOINED,
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama 1 to 3, SmolLM2, TinyLlama", gguf="llama"),
        Family("mistral", "Mistral without a sliding window (7B v0.2 and later, Nemo, Small)"),
        Family("phi3", "Phi-4 (14B)", joined=PHI_JOINED),
        Family("qwen2", "Qwen2, Qwen2.5", qkv_bias=True, gguf="qwen2"),
        Family("qwen3", "Qwen3", qk_norm=True, gguf="qwen3"),
        Family("qwen3_moe", "Qwen3-MoE (30B-A3B, 235B-A22B)", qk_norm=True, experts=True),
        Family("qwen2_5_vl", "Qwen2.5-VL", qkv_bias=True, vision=QWEN2_5_VISION),
        Family("qwen3_vl", "Qwen3-VL", qk_norm=True, mrope_interleaved=True, vision=QWEN3_VISION),
        Family(
            "qwen3_vl_moe",
            "Qwen3-VL-MoE (30B-A3B, 235B-A22B)",
            qk_norm=True,
            mrope_interleaved=True,
            vision=QWEN3_MOE_VISION,
            experts=True,
        ),
        Family("qwen3_5_text", "Qwen3.5 without its vision tower", **QWEN3_5),
        Family("qwen3_5_moe_text", "Qwen3.5-MoE without its vision tower", experts=True, **QWEN3_5),
        Family("qwen3_5", "Qwen3.5 (0.8B to 27B)", vision=QWEN3_5_VISION, **QWEN3_5),
        Family("qwen3_5_moe", "Qwen3.5-MoE (35B-A3B)", vision=QWEN3_5_MOE_VISION, experts=True, **QWEN3_5),
    )
}
