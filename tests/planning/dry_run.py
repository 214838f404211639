"""Body of test_check.py: every rank's tensors for the shipped 3B configs on 8 and 32 GPUs and for harder layouts.

A program of its own, because it replaces the process groups. Prints `ok`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from vold.config import load_config, schema
from vold.config.schema import ParallelConfig
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import short_name
from vold.models.flops import language_model_parameters
from vold.planning.meta_memory import training_state_bytes
from vold.planning.rank_shapes import rank_shards
from vold.planning.stage_memory import stage_memories
from vold.planning.step_sizes import StepSizes

CONFIGS = Path(__file__).parents[2] / "configs" / "qwen2.5-vl-3b"
AWAY = {"a": "false", "b": "true"}  # whether a teacher waits in CPU memory
LAYOUTS = [
    dict(tp=2, sp=True),
    dict(pp=2, vpp=9),
    dict(tp=2, pp=4, sp=True),
    dict(tp=2, pp=2, vpp=2, sp=True, distributed_optimizer=True),
]


def student() -> Qwen2_5_VLConfig:
    """The published numbers of Qwen2.5-VL-3B."""
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            max_position_embeddings=128000,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        tie_word_embeddings=True,
    )


def teacher() -> Qwen3Config:
    """The published numbers of Qwen3-8B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )


def parallel_of(name: str, schema_type: type) -> ParallelConfig:
    return load_config(schema_type, CONFIGS / name).parallel


def main() -> None:
    shipped = [parallel_of("sft.yaml", schema.SftConfig), parallel_of("vold.yaml", schema.RlConfig)]
    models = {
        3_085_938_688: (student(), Qwen2_5_VLForConditionalGeneration),
        8_190_735_360: (teacher(), Qwen3ForCausalLM),
    }
    for parameters, (config, model_type) in models.items():
        with torch.device("meta"):
            state_dict = model_type(config).state_dict()
        shapes = {short_name(name): tuple(t.shape) for name, t in state_dict.items() if "visual" not in name}
        if config.tie_word_embeddings:
            shapes.pop("lm_head.weight")
        for parallel, processes in [(shipped[0], 8), (shipped[1], 32), *((ParallelConfig(**x), 8) for x in LAYOUTS)]:
            check_shards(rank_shards(Architecture.from_config(config), parallel, processes), shapes, parameters)
    [first, *_] = rank_shards(Architecture.from_config(student()), shipped[1], 8)
    # 2 bytes of weights and 4 of gradients a parameter; 12 of masters and moments on 8 ranks together
    assert (
        sum(training_state_bytes(first.parameters, first.layout, torch.bfloat16).values())
        == (6 + 12 / 8) * 3_085_938_688
    )
    with_images = rank_shards(Architecture.from_config(student()), ParallelConfig(pp=2), 2, train_merger=True)
    mergers = [sum(name.startswith("visual.merger.") for name in rank.tensors) for rank in with_images]
    assert mergers == [5, 0], "norm, two weights, two biases, where the embedding is"
    with pytest.raises(ValueError, match="tp=4 does not divide kv_heads=2 of this model: choose a tp that does"):
        rank_shards(Architecture.from_config(student()), ParallelConfig(tp=4), 8)
    check_several_teachers()
    print("ok")


def check_several_teachers() -> None:
    """Two teachers in the trainer: one stays, the other comes from CPU memory while it scores."""
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), {}
        small = student().to_dict()
        _save(folder / "student", small, small["text_config"], 2)
        for role, layers in (("a", 2), ("b", 3)):
            config = teacher().to_dict()
            _save(folder / role, config, config, layers)
            texts[role] = 2 * language_model_parameters(Architecture.from_pretrained(folder / role))
        a, b = (f"{role}: {{path: {folder}/{role}, engine: trainer, offload: {off}}}" for role, off in AWAY.items())
        paths = [f"student={folder}/student", "teacher=null", "teacher_offload=false", f"teachers={{{a}, {b}}}"]
        config = load_config(schema.RlConfig, CONFIGS / "vold.yaml", [*paths, "evaluation.every=0"])
        [memory] = stage_memories(StepSizes(config, 1), "cpu")
    assert memory.resident["teacher"] == texts["a"] and memory.phases["teacher"]["teacher"] == texts["b"]
    assert memory.models["teacher"] == sum(texts.values()) and memory.host == texts["b"]


def _save(folder: Path, config: dict, text: dict, layers: int) -> None:
    text.pop("layer_types", None)
    text["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


def check_shards(shards, shapes: dict[str, tuple[int, ...]], parameters: int) -> None:
    """Every copy of the model holds each tensor of the checkpoint once: a share on each tp rank, or all of it."""
    for dp_rank in range(shards[0].layout.dp):
        replica = [shard for shard in shards if shard.layout.dp_rank == dp_rank]
        total = 0
        for tp_rank in range(shards[0].layout.tp):
            stages = [shard.tensors for shard in replica if shard.layout.tp_rank == tp_rank]
            built = {name: shape for tensors in stages for name, (shape, _) in tensors.items()}
            assert built == shapes and sum(map(len, stages)) == len(shapes)
            total += sum(here for tensors in stages for shape, here in tensors.values() if len(shape) > 1)
            total += sum(here for tensors in stages for name, (_, here) in tensors.items() if name.endswith(".bias"))
        norms = sum(shape[0] for name, shape in shapes.items() if len(shape) == 1 and not name.endswith(".bias"))
        assert total + norms == parameters


if __name__ == "__main__":
    main()
