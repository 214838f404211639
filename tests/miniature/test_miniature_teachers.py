"""Two specialists and a column: the halves, what a specialist learns, and arms that differ in their teachers alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from vold.config import load_config, schema
from vold.data.problems import load_problems
from vold.miniature import several_teachers, world
from vold.miniature.examples import specialist_example
from vold.miniature.make import MiniatureWorld
from vold.miniature.pipeline import CONFIGS
from vold.report import seeds_table

MADE, OUT = MiniatureWorld.at(Path("runs/miniature/seed0")), Path("runs/several-teachers")


def test_a_specialist_is_right_on_its_half_and_mistaken_at_every_step_on_the_other():
    seen = set()
    for seed in range(40):
        example = specialist_example(np.random.default_rng(seed), "words")
        (question, _), (response, _) = example.segments
        half = world.half_of(question)
        problem = world.solve(response.removeprefix("<think>").partition(">")[0])
        written = world.trace(problem) if half == "words" else world.trace(world.mistaken(problem))
        assert response.startswith(written)
        if half == "digits":
            mistaken, left = world.mistaken(problem).running, int(problem.expression[0])
            steps = zip(problem.expression[1::2], problem.expression[2::2], mistaken[1:], strict=True)
            for operation, operand, value in steps:
                assert value == (world.apply(left, operation, int(operand)) + 1) % 10
                left = value
        seen.add(half)
    assert seen == set(world.HALVES)


def test_every_row_names_its_specialist_and_tests_are_of_one_half(tmp_path):
    data = several_teachers.write_halves(tmp_path / "data", seed=0, rows=20, tests=6)
    config = schema.DataConfig(path=data / "train.jsonl", layout="geometry3k")
    problems = load_problems(config, keep_metadata=True)
    assert [p.metadata["teacher"] for p in problems] == ["digits", "words"] * 10
    assert all(world.half_of(p.question) == p.metadata["teacher"] for p in problems)
    for half in world.HALVES:
        rows = [json.loads(line) for line in (data / f"test_{half}.jsonl").read_text().splitlines()]
        assert len(rows) == 6 and {world.half_of(row["problem"]) for row in rows} == {half}
    assert several_teachers.write_halves(data, seed=1) == data, "kept"


def test_arms_differ_in_their_teachers_alone():
    loaded = {}
    for arm in several_teachers.ARMS:
        overrides = [*several_teachers.arm_overrides(arm, OUT, MADE, OUT / "data", 1), f"run_dir={OUT / arm}"]
        loaded[arm] = load_config(schema.RlConfig, CONFIGS / "rl.yaml", overrides).model_dump()
    both = loaded["both-by-column"]
    assert both["teacher"] is None and both["teacher_column"] == "teacher"
    paths = {half: OUT / "teachers" / half for half in world.HALVES}
    assert {name: teacher["path"] for name, teacher in both["teachers"].items()} == paths
    assert {arm: config["teacher"] for arm, config in loaded.items()} == {
        "digits-teacher": paths["digits"],
        "words-teacher": paths["words"],
        "both-by-column": None,
    }
    for config in loaded.values():
        for key in ("run_dir", "teacher", "teachers", "teacher_column"):
            config.pop(key)
    assert loaded["digits-teacher"] == loaded["words-teacher"] == both


def test_the_report_has_a_row_a_seed_and_arm(tmp_path):
    rows = [
        {"arm": arm, "seed": seed, "digits": 0.5 + seed / 100, "words": 0.6, "mean": 0.55 + seed / 200}
        for arm in several_teachers.ARMS
        for seed in range(2)
    ]
    several_teachers.write_report(tmp_path, rows, {"rows": rows})
    assert (tmp_path / "rows.csv").read_text().splitlines()[:2] == [
        "arm,seed,digits,words,mean",
        "digits-teacher,0,0.5,0.6,0.55",
    ]
    assert "50.5 ± 0.5" in (tmp_path / "table.md").read_text() and json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_table_of_the_rows_on_file():
    root = Path(__file__).parents[2]
    with (root / "benchmarks" / "results" / "several_teachers.csv").open() as file:
        rows = [
            {key: value if key == "arm" else float(value) for key, value in row.items()} for row in csv.DictReader(file)
        ]
    assert len(rows) == 4 * 3 and seeds_table(rows) in (root / "docs" / "teachers.md").read_text()
    means = {(row["arm"], row["seed"]): row["mean"] for row in rows}
    for seed in range(3):
        assert means["both-by-column", seed] > max(means[f"{half}-teacher", seed] for half in world.HALVES)
