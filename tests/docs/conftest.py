"""A directory as the pages assume it: configs/, checkpoints/, data/ and the demo's runs/, with tiny models and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from commands import ROOT, fenced


@pytest.fixture(scope="session")
def reader_dir(tmp_path_factory, tiny_student_dir, tiny_teacher_dir, tiny_qwen3_vl_dir) -> Path:
    from vold.miniature.data import DataSizes, write_data

    directory = tmp_path_factory.mktemp("reader")
    (directory / "configs").symlink_to(ROOT / "configs")
    (directory / "examples").symlink_to(ROOT / "examples")
    (directory / "vold" / "miniature").mkdir(parents=True)
    (directory / "vold" / "miniature" / "configs").symlink_to(ROOT / "vold" / "miniature" / "configs")
    miniature = directory / "runs" / "miniature" / "seed0"
    checkpoints = {
        "checkpoints/Qwen2.5-VL-3B-Instruct": tiny_student_dir,
        "checkpoints/Qwen3-8B": tiny_teacher_dir,
        "checkpoints/Qwen3-VL-8B-Thinking": tiny_qwen3_vl_dir,
        "runs/miniature/seed0/teacher": tiny_teacher_dir,
        "runs/miniature/seed0/base": tiny_student_dir,
        "runs/demo/sft/model": tiny_student_dir,
        "runs/selfplay/start/model": tiny_student_dir,
    }
    for name, checkpoint in checkpoints.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(checkpoint)
    write_data(miniature / "data", 0, DataSizes(train=8, traces_prompts=16, traces_other=1, val=2, test=2))
    _public_data(miniature / "data", directory / "data")
    (directory / "answers.jsonl").write_text('{"gold": "42", "response": "\\\\boxed{42}"}\n')
    return directory


def _public_data(world: Path, data: Path) -> None:
    """Write the files that configs/qwen2.5-vl-3b names, in their own layouts, and the rows that a page shows."""
    data.mkdir()
    shutil.copy(world / "train.json", data / "orz_math_57k_collected.json")
    questions = [row[0]["value"] for row in json.loads((world / "traces_prompts.json").read_text())]
    messages = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    parquet.write_table(pa.Table.from_pylist(messages), data / "mixture-of-thoughts.parquet")
    rows = [json.loads(line) for line in (world / "test_image.jsonl").read_text().splitlines()]
    with_bytes = [row | {"images": [{"bytes": (world / row["images"][0]).read_bytes(), "path": None}]} for row in rows]
    snapshot = data / "geometry3k" / "data"
    snapshot.mkdir(parents=True)
    for name in ("train", "validation", "test"):
        parquet.write_table(pa.Table.from_pylist(with_bytes), snapshot / f"{name}-00000-of-00001.parquet")
    shutil.copytree(world / "images", data / "vlaa" / "images")
    vlaa = [{"question": row["problem"], "gt": row["answer"], "image": row["images"][0]} for row in rows]
    (data / "VLAA-Thinking-GRPO-25K.json").write_text(json.dumps(vlaa))
    mine = data / "mine"
    (mine / "images").mkdir(parents=True)
    (mine / "problems.jsonl").write_text(fenced("your-own-data", "json"))
    shutil.copy(world / rows[0]["images"][0], mine / "images" / "0001.png")
