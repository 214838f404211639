"""Writes the data files, in the layouts of the public data sets: orz-57k for text, Geometry3K for images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vold.miniature import world
from vold.miniature.files import atomic_directory
from vold.miniature.world import Problem, Split
from vold.objectives.visual_advantage import degrade

TEXT_FILES: dict[str, Split] = {
    "train.json": "train",
    "traces_prompts.json": "train",
    "val_text.json": "val",
    "test_text.json": "test",
}
IMAGE_FILES: dict[str, Split] = {"val_image.jsonl": "val", "test_image.jsonl": "test"}
PICTURE_FILES: dict[str, Split] = {
    "train_image.jsonl": "train",
    "train_small.jsonl": "train",
    "val_small.jsonl": "val",
    "test_small.jsonl": "test",
}
"""Files of the second act: `image` as in IMAGE_FILES, `small` with one operand of each picture drawn small."""
HELD_OUT_FILES: dict[str, Split] = {
    "val_text.json": "val",
    "test_text.json": "test",
    "val_image.jsonl": "val",
    "test_image.jsonl": "test",
}
"""More problems to judge models by, each file without repeats."""
DEGRADED_COLUMN = "degraded"
OTHER_STYLE_FILE = "traces_other.jsonl"
EXPRESSIONS_FILE = "expressions.json"
"""The expression in each picture, `{"images/val_0001.png": "7*9+5*3", …}`: for measuring, never for training."""


@dataclass(frozen=True)
class DataSizes:
    """Rows in each file; val and test count each modality."""

    train: int = 4096
    traces_prompts: int = 3000
    traces_other: int = 2500
    val: int = 200
    test: int = 400


def write_data(out_dir: Path, seed: int, sizes: DataSizes = DataSizes()) -> Path:
    """Write all files of `TEXT_FILES`, `IMAGE_FILES`, `OTHER_STYLE_FILE`, `EXPRESSIONS_FILE` and `images/*.png`.

    An existing `out_dir` is kept. Each file has its own random stream, so changing one size leaves the others alone.
    """
    if out_dir.exists():
        return out_dir
    with atomic_directory(out_dir) as unfinished:
        (unfinished / "images").mkdir()
        for stream, (name, split) in enumerate(TEXT_FILES.items()):
            rng = np.random.default_rng([seed, stream])
            rows = [_orz_row(world.sample_problem(rng, split), rng) for _ in range(_size(sizes, name))]
            _write_json(unfinished / name, rows)
        expressions: dict[str, str] = {}
        for stream, (name, split) in enumerate(IMAGE_FILES.items(), start=10):
            rng = np.random.default_rng([seed, stream])
            problems = [world.sample_problem(rng, split) for _ in range(_size(sizes, name))]
            rows = _image_rows(unfinished, problems, rng, name=split)
            _write_jsonl(unfinished / name, rows)
            expressions |= {row["images"][0]: p.expression for row, p in zip(rows, problems, strict=True)}
        (unfinished / EXPRESSIONS_FILE).write_text(json.dumps(expressions, indent=0) + "\n")
        rng = np.random.default_rng([seed, 20])
        rows = [_other_row(world.sample_problem(rng), rng) for _ in range(sizes.traces_other)]
        _write_jsonl(unfinished / OTHER_STYLE_FILE, rows)
    return out_dir


def write_pictures(
    out_dir: Path, seed: int, sizes: DataSizes = DataSizes(train=1536), degraded: float | None = None
) -> Path:
    """Write all files of `PICTURE_FILES` and their pictures, Geometry3K layout; an existing `out_dir` is kept.

    degraded: each picture also has a copy at this scale (see vold.objectives.visual_advantage), in the column
    DEGRADED_COLUMN.
    """
    if out_dir.exists():
        return out_dir
    with atomic_directory(out_dir) as unfinished:
        (unfinished / "images").mkdir()
        expressions: dict[str, str] = {}
        for stream, (name, split) in enumerate(PICTURE_FILES.items(), start=40):
            rng = np.random.default_rng([seed, stream])
            problems = [world.sample_problem(rng, split) for _ in range(getattr(sizes, split))]
            small = world.sample_detail(len(problems), rng) if name.endswith("_small.jsonl") else ()
            rows = _image_rows(unfinished, problems, rng, name=name.removesuffix(".jsonl"), small=small)
            expressions |= {row["images"][0]: p.expression for row, p in zip(rows, problems, strict=True)}
            if degraded is not None:
                rows = [row | {DEGRADED_COLUMN: _degraded_copies(unfinished, row["images"], degraded)} for row in rows]
            _write_jsonl(unfinished / name, rows)
        (unfinished / EXPRESSIONS_FILE).write_text(json.dumps(expressions, indent=0) + "\n")
    return out_dir


def _degraded_copies(out_dir: Path, images: list[str], scale: float) -> list[str]:
    copies = [image.replace(".png", "_degraded.png") for image in images]
    for image, copy in zip(images, copies, strict=True):
        with Image.open(out_dir / image) as picture:
            degrade(picture, scale).save(out_dir / copy)
    return copies


def write_held_out(out_dir: Path, seed: int, sizes: DataSizes = DataSizes(val=300, test=2000)) -> Path:
    """Write all files of `HELD_OUT_FILES`, their pictures and `EXPRESSIONS_FILE`; an existing `out_dir` is kept."""
    if out_dir.exists():
        return out_dir
    with atomic_directory(out_dir) as unfinished:
        (unfinished / "images").mkdir()
        expressions: dict[str, str] = {}
        for stream, (name, split) in enumerate(HELD_OUT_FILES.items(), start=70):
            rng = np.random.default_rng([seed, stream])
            problems = _different_problems(rng, split, _size(sizes, name))
            if name.endswith("_text.json"):
                _write_json(unfinished / name, [_orz_row(problem, rng) for problem in problems])
                continue
            rows = _image_rows(unfinished, problems, rng, name=split)
            _write_jsonl(unfinished / name, rows)
            expressions |= {row["images"][0]: p.expression for row, p in zip(rows, problems, strict=True)}
        (unfinished / EXPRESSIONS_FILE).write_text(json.dumps(expressions, indent=0) + "\n")
    return out_dir


def _different_problems(rng: np.random.Generator, split: Split, count: int) -> list[Problem]:
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = world.sample_problem(rng, split)
        found.setdefault(problem.expression, problem)
    return list(found.values())


def _size(sizes: DataSizes, name: str) -> int:
    stem = name.split(".")[0]
    return getattr(sizes, stem.removesuffix("_text").removesuffix("_image"))


def _orz_row(problem: Problem, rng: np.random.Generator) -> list[dict]:
    question = {"from": "human", "value": world.text_question(problem, rng)}
    return [question, {"from": "assistant", "ground_truth": {"value": problem.answer}}]


def _other_row(problem: Problem, rng: np.random.Generator) -> dict:
    return {"prompt": world.text_question(problem, rng), "response": world.trace_other(problem)}


def _image_rows(
    out_dir: Path, problems: list[Problem], rng: np.random.Generator, *, name: str, small: Sequence[int] = ()
) -> list[dict]:
    """Write the pictures (RGB PNG); return the rows that name them, relative to the data directory."""
    grey_BHW = world.render([problem.expression for problem in problems], rng, small)
    rows = []
    for number, (problem, grey_HW) in enumerate(zip(problems, grey_BHW, strict=True), start=1):
        image = f"images/{name}_{number:04d}.png"
        Image.fromarray(grey_HW).convert("RGB").save(out_dir / image)
        rows.append({"problem": world.image_question(rng), "answer": problem.answer, "images": [image]})
    return rows


def _write_json(path: Path, rows: list) -> None:
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
