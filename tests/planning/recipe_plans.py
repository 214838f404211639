"""Body of test_recipes.py: parameters of the published models, the parts of each rank, the recipes' plans and checks.

A program of its own, because it replaces the process groups. Prints `ok`.
"""

from __future__ import annotations

import json
import tempfile
from math import prod
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig
from transformers import Qwen3VLMoeForConditionalGeneration as Qwen3VLMoe

from support import tiny
from vold.config import load_config, schema
from vold.models.architecture import Architecture
from vold.models.families import FAMILIES
from vold.models.flops import active_parameters, language_model_parameters
from vold.planning import check
from vold.planning.gpu_specs import GPU_SPECS
from vold.planning.machine import hide_gpus
from vold.planning.memory_table import fullest
from vold.planning.rank_shapes import rank_shards
from vold.planning.stage_memory import stage_memories
from vold.planning.step_sizes import StepSizes
from vold.planning.step_time import phase_work

CONFIGS = Path(__file__).parents[2] / "configs"
# Facts of the published config.json files.
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
TEXT = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6}
TEXT |= {"rope_parameters": ROPE}
VISION = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def qwen3_vl_4b() -> Qwen3VLConfig:
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return Qwen3VLConfig(
        text_config=TEXT | text | {"num_key_value_heads": 8, "tie_word_embeddings": True},
        vision_config=VISION | vision | {"out_hidden_size": 2560},
        tie_word_embeddings=True,
        **IDS,
    )


def qwen3_vl_30b_a3b() -> Qwen3VLMoeConfig:
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    return Qwen3VLMoeConfig(
        text_config=TEXT | text | experts | {"num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
        vision_config=VISION | vision | {"out_hidden_size": 2048},
        tie_word_embeddings=False,
        **IDS,
    )


def qwen3_vl_32b() -> Qwen3VLConfig:
    text = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    return Qwen3VLConfig(
        text_config=TEXT | text | {"num_key_value_heads": 8, "tie_word_embeddings": False},
        vision_config=VISION | vision | {"out_hidden_size": 5120},
        tie_word_embeddings=False,
        **IDS,
    )


STUDENTS = {"qwen3-vl-4b": qwen3_vl_4b, "qwen3-vl-30b-a3b": qwen3_vl_30b_a3b}
RECIPES = [  # file, GPU, training processes
    ("qwen3-vl-4b/vold.yaml", "a100-80g", 6),
    ("qwen3-vl-4b/long.yaml", "a100-80g", 6),
    ("qwen3-vl-30b-a3b/vold.yaml", "h200", 24),
    ("qwen3-vl-30b-a3b/one-node.yaml", "a100-80g", 4),
]


def sizes_of(recipe: str, processes: int, folder: Path, *overrides: str) -> StepSizes:
    student, teacher = folder / recipe.split("/")[0], folder / "teacher"
    if not student.exists():
        STUDENTS[student.name]().save_pretrained(student)
        qwen3_vl_32b().save_pretrained(teacher)
    places = [f"student={student}", f"teacher={teacher}", *overrides]
    return StepSizes(load_config(schema.RlConfig, CONFIGS / recipe, places), processes)


def check_counts() -> None:
    for config, model_type, total, active in (
        (qwen3_vl_4b(), Qwen3VLForConditionalGeneration, 4_022_468_096, 4_022_468_096),
        (qwen3_vl_30b_a3b(), Qwen3VLMoe, 30_532_122_624, 3_353_032_704),
    ):
        arch = Architecture.from_config(config)
        with torch.device("meta"):
            model = model_type(config)
        of_transformers = sum(p.numel() for name, p in model.named_parameters() if "visual" not in name)
        assert language_model_parameters(arch) == of_transformers == total, (language_model_parameters(arch), total)
        assert active_parameters(arch) == active, active_parameters(arch)


def check_parts(folder: Path) -> None:
    """Each of 8 ranks holds 16 of 128 experts of every layer, and everything else."""
    sizes = sizes_of("qwen3-vl-30b-a3b/vold.yaml", 24, folder)
    shards = rank_shards(sizes.student, sizes.config.parallel, 8)
    for shard in shards:
        held = {int(name.split(".")[4]) for name in shard.tensors if ".experts." in name}
        first = 16 * shard.layout.experts.ep_rank
        assert held == set(range(first, first + 16)) and shard.layout.experts.dp == 1
        assert shard.parameters == sizes.student.layers * 3 * 768 * 2048 * 16 + 1_541_093_376, shard.parameters


def check_plans(folder: Path) -> None:
    for recipe, gpu, processes in RECIPES:
        stages = stage_memories(sizes_of(recipe, processes, folder), "cuda")
        peak, usable = fullest(stages).peak, GPU_SPECS[gpu].usable_memory
        print(f"{recipe} on {processes} x {gpu}: {peak / 2**30:.1f} GiB of {usable / 2**30:.1f}")
        assert peak <= usable, (recipe, gpu, peak / 2**30)


def without_weights(model_type: type, folder: Path) -> None:
    """A checkpoint's files with their headers alone, as published: the experts of a layer in one tensor, transposed.
    The rest of each file takes no space on disk."""
    with torch.device("meta"):
        state = model_type(model_type.config_class.from_pretrained(folder)).state_dict()
    files: list[dict] = [{}]
    for name, tensor in state.items():
        shape = [*(tensor.transpose(1, 2) if ".experts." in name else tensor).shape]
        end = max((entry["data_offsets"][1] for entry in files[-1].values()), default=0)
        if end > 2**32:
            files, end = [*files, {}], 0
        files[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
    for number, header in enumerate(files):
        text, end = json.dumps(header).encode(), max(entry["data_offsets"][1] for entry in header.values())
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    places = {name: f"model-{number}.safetensors" for number, header in enumerate(files) for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def check_checks(folder: Path) -> None:
    """What `vold check` says of method, layout and both models."""
    for recipe, _, processes in RECIPES[1:3]:
        config = sizes_of(recipe, processes, folder).config
        without_weights(Qwen3VLMoe if config.parallel.ep > 1 else Qwen3VLForConditionalGeneration, config.student)
        assert "vold, 60 steps" in check._check_method(config)
        assert f"{processes} processes = dp" in check._check_layout(config.parallel, processes)
        line = check._check_model("student", config, config.parallel.ep * config.parallel.cp)
        assert "shapes as built" in line, line
        assert "a head of 151936 × 5120, in vLLM" in check._check_model("teacher", config, processes)
        print(line)


def check_families(folder: Path) -> None:
    """Every architecture of the registry is planned and checked: a tiny one's memory, and its tensors by rank."""
    for name in FAMILIES:
        student = tiny.save(tiny.FAMILIES[name](), folder / name)
        places = [f"student={student}", f"teacher={folder / 'teacher'}", "prompt.max_tokens=64"]
        places += ["rollout.max_new_tokens=64", "microbatch_tokens=128"]
        config = load_config(schema.RlConfig, CONFIGS / "qwen3-vl-4b" / "vold.yaml", places)
        assert f"{name}, " in check._check_model("student", config, 1)
        sizes = StepSizes(config, 1)
        assert fullest(stage_memories(sizes, "cuda")).peak > 0 and phase_work(sizes)["student_backward"].flop > 0


def check_work(folder: Path) -> None:
    """A step's FLOP follow from the parameters that a token meets, an update's bytes from those that a rank holds."""
    sizes = sizes_of("qwen3-vl-30b-a3b/vold.yaml", 24, folder)
    work = phase_work(sizes)
    matmuls = 2 * active_parameters(sizes.student) * sizes.tokens_per_replica
    assert 0.9 < work["student_forward"].flop / matmuls < 2, work["student_forward"].flop / matmuls
    undivided = sizes_of("qwen3-vl-30b-a3b/vold.yaml", 24, folder, "parallel.distributed_optimizer=false")
    dense = language_model_parameters(sizes.student) - 28_991_029_248
    assert phase_work(undivided)["optimizer"].moved == 30 * (dense + 28_991_029_248 / 8)


def main() -> None:
    hide_gpus()
    with tempfile.TemporaryDirectory() as folder:
        check_counts()
        check_parts(Path(folder))
        check_plans(Path(folder))
        check_checks(Path(folder))
        check_families(Path(folder))
        check_work(Path(folder))
    print("ok")


if __name__ == "__main__":
    main()
