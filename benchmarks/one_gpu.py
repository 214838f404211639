"""What fits on one GPU: `python -m benchmarks.one_gpu` plans VOLD's second stage of five students and writes
results/one_gpu.csv and one_gpu.md. Nothing is loaded; the architectures are those of published config.json files."""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vold.config import load_config
from vold.config.schema import RlConfig
from vold.planning.gpu_specs import GPU_SPECS
from vold.planning.machine import hide_gpus
from vold.planning.memory_table import fullest
from vold.planning.stage_memory import TraceCache, stage_memories
from vold.planning.step_sizes import StepSizes
from vold.report.tables import markdown
from vold.run.timers import GIB

RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[1] / "configs" / "qwen2.5-vl-3b" / "one-gpu.yaml"
CARDS = ("rtx4090-24g", "a100-40g", "a100-80g", "h200")
ROPE = {"rope_type": "default", "rope_theta": 5e6}
_VISION_2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
_VISION_3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}


def _text(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int = 151936, **more) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128000}
    return sizes | heads_of | more


def _qwen2_5_vl(tied: bool, **text) -> dict:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = _VISION_2_5 | {"out_hidden_size": text["hidden"], "fullatt_block_indexes": [7, 15, 23, 31]}
    types = {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied}
    return types | {"text_config": _text(**text) | rope, "vision_config": vision}


def _qwen3_vl(tied: bool, vision: dict, **text) -> dict:
    rope = {"rope_parameters": ROPE | {"mrope_section": [24, 20, 20], "mrope_interleaved": True}, "head_dim": 128}
    types = {"model_type": "qwen3_vl", "tie_word_embeddings": tied}
    tower = _VISION_3 | {"out_hidden_size": text["hidden"], "deepstack_visual_indexes": [5, 11, 17]} | vision
    return types | {"text_config": _text(**text) | rope, "vision_config": tower | {"num_position_embeddings": 2304}}


_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
STUDENTS = {
    "Qwen2.5-VL-3B": _qwen2_5_vl(True, hidden=2048, ffn=11008, layers=36, heads=16, kv_heads=2),
    "Qwen2.5-VL-7B": _qwen2_5_vl(False, hidden=3584, ffn=18944, layers=28, heads=28, kv_heads=4, vocab=152064),
    "Qwen3-VL-2B": _qwen3_vl(True, {}, hidden=2048, ffn=6144, layers=28, heads=16, kv_heads=8),
    "Qwen3-VL-4B": _qwen3_vl(True, {}, hidden=2560, ffn=9728, layers=36, heads=32, kv_heads=8),
    "Qwen3-VL-8B": _qwen3_vl(False, _LARGE, hidden=4096, ffn=12288, layers=36, heads=32, kv_heads=8),
}
TEACHER = {"model_type": "qwen3", "tie_word_embeddings": False, "rope_parameters": ROPE, "head_dim": 128} | _text(
    4096, 12288, 36, 32, 8
)
TEACHER_NAME = "Qwen3-8B"

TRAINED = {
    "LoRA": (),
    "all": ("adapter=null",),
    "all, offloaded": ("adapter=null", "optimizer.offload=true", "parallel.offload_activations=true"),
}
TEACHERS = {
    "in the trainer": ("teacher_offload=false",),
    "offloaded": ("teacher_offload=true",),
    "served": ("teacher_engine=vllm", "teacher_vllm.urls=[http://127.0.0.1:8000]"),
}
SETTINGS = ("rollout.vllm.kv_cache_gib=4", "microbatch_tokens=9216")


def rows() -> Iterator[dict]:
    """Peak of every student, choice of what is trained, and teacher."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in (*STUDENTS, TEACHER_NAME)}
        for name, config in (STUDENTS | {TEACHER_NAME: TEACHER}).items():
            paths[name].mkdir()
            (paths[name] / "config.json").write_text(json.dumps(config))
        for student in STUDENTS:
            for trained, overrides in TRAINED.items():
                cache: TraceCache = {}
                for teacher, where in TEACHERS.items():
                    models = (f"student={paths[student]}", f"teacher={paths[TEACHER_NAME]}")
                    config = load_config(RlConfig, CONFIG, (*models, *SETTINGS, *overrides, *where))
                    stage = fullest(stage_memories(StepSizes(config, 1), "cuda", cache))
                    peak, phase = stage.peak / GIB, max(stage.phases, key=stage.total)
                    row = {"student": student, "trained": trained, "teacher": teacher, "phase": phase}
                    yield row | {"peak_gib": f"{peak:.1f}", "host_gib": f"{stage.host / GIB:.1f}", "card": _card(peak)}


def _card(peak: float) -> str:
    """The smallest card with so much memory to give."""
    return next((card for card in CARDS if peak * GIB <= GPU_SPECS[card].usable_memory), "none")


def table(found: list[dict]) -> str:
    """Markdown: for each student and choice, peak and smallest card with the teacher in three places."""
    body = []
    for student in STUDENTS:
        for trained in TRAINED:
            by_teacher = {r["teacher"]: r for r in found if (r["student"], r["trained"]) == (student, trained)}
            cells = [f"{by_teacher[t]['peak_gib']} ({_size(by_teacher[t]['card'])})" for t in TEACHERS]
            body.append([student, trained, *cells, by_teacher["offloaded"]["host_gib"]])
    names = [f"teacher {teacher}" for teacher in TEACHERS]
    return markdown(["student", "trained", *names, "CPU memory, teacher offloaded"], body)


def _size(card: str) -> str:
    sizes = dict(zip(CARDS, ("24 GB", "40 GB", "80 GB", "141 GB"), strict=True))
    return sizes.get(card, "none of them")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    hide_gpus()
    found = []
    for row in rows():
        found.append(row)
        print(*row.values(), flush=True)
    with (RESULTS / "one_gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    (RESULTS / "one_gpu.md").write_text(f"# What fits on one GPU, GiB\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
