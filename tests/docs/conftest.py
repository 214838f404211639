"""A directory as the pages assume it: configs/, checkpoints/, data/ and the demo's runs/, with tiny models and data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def stand_in(reader_dir) -> Iterator[StandIn]:
    """One process for all programs of this folder."""
    process = StandIn(reader_dir)
    yield process
    process.close()


class StandIn:
    """stand_in.py, started when it is first asked."""

    def __init__(self, directory: Path):
        self._directory, self._errors = directory, directory / "stand-in.stderr"
        self._process: subprocess.Popen | None = None

    def outcomes(self, program: str, *arguments: object) -> list[Any]:
        """What `outcomes(*arguments)` of a module of this folder returns. Fails the test where it raises."""
        if self._process is None:
            self._start()
        self._requests.write(json.dumps([program, arguments]) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            self.close()
            pytest.fail(f"{program}: the process ended: {self._errors.read_text()[-3000:]}", pytrace=False)
        answer = json.loads(line)
        return answer["outcomes"] if "outcomes" in answer else pytest.fail(answer["error"], pytrace=False)

    def _start(self) -> None:
        asked, requests = os.pipe()
        answers, told = os.pipe()
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "docs" / "stand_in.py", str(asked), str(told)],
                cwd=self._directory,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(asked, told),
            )
        os.close(asked), os.close(told)
        self._requests, self._answers = os.fdopen(requests, "w"), os.fdopen(answers)

    def close(self) -> None:
        """End it: it reads to the end of its requests."""
        if self._process is not None:
            self._requests.close(), self._answers.close()
            self._process.wait(60)
            self._process = None


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
