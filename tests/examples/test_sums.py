"""examples/sums.py: the data of docs/smollm2.md, which its three stages do not share, and the picture."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from vold.config.schema import DataConfig
from vold.data.problems import load_problems

SUMS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "sums.py"))


def test_no_sum_is_in_two_files(tmp_path):
    SUMS["write"](tmp_path)
    rows = [json.loads(line) for name in ("cold", "train", "test") for line in (tmp_path / f"{name}.jsonl").open()]
    asked = [row.get("prompt", row.get("question")) for row in rows]
    assert len(asked) == len(set(asked)) == 49 * 49
    for problem in load_problems(DataConfig(path=tmp_path / "test.jsonl", layout="vqa")):
        a, b = problem.question.removeprefix("What is ").rstrip("?").split(" + ")
        assert problem.gold == str(int(a) + int(b))


def test_the_curve_is_drawn(tmp_path):
    rows = [{"step": step, "reward": step / 20} for step in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    SUMS["draw"](tmp_path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
