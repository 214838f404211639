"""The comparison with TRL: turns, the proof of equal work, the table. TRL itself is in the benchmarks' environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import COLUMNS, EQUAL, NATURAL, OURS, PEER, Job
from benchmarks.harness import read_rows, write_rows


def job(world: tuple[str, str], work: str = EQUAL, steps: int = 2) -> Job:
    return Job(
        *world,
        work=work,
        steps=steps,
        prompts_per_step=2,
        responses_per_prompt=2,
        max_new_tokens=5,
        trl_batch=4,
        microbatch_tokens=256,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[str, str]:
    return end_to_end.untrained_world(tmp_path_factory.mktemp("world"))


def test_trainers_take_turns_at_the_same_work(world):
    names = [OURS, PEER] if importlib.util.find_spec("trl") else [OURS]
    rows = end_to_end.measure(job(world), names)
    assert [(row["trainer"], row["step"]) for row in rows] == [(name, 1) for name in names]
    for row in rows:
        assert row["prompts"] == 2 and row["responses"] == 4 and row["seconds"] > 0 and row["cpu_seconds"] > 0
        assert row["response_tokens"] == row["gradient_tokens"] == 4 * 5


def test_a_trainer_that_stops_says_why():
    with pytest.raises(RuntimeError, match=f"(?s){OURS} stopped: .*has no config.json"):
        end_to_end.measure(job(("nowhere", "nothing")), [OURS])


@pytest.mark.parametrize(("key", "value"), [("digest", "b"), ("responses", 5), ("response_tokens", 19)])
def test_unequal_work_is_refused(key, value):
    ours = {"prompts": 2, "digest": "a", "responses": 4, "response_tokens": 20, "gradient_tokens": 20}
    task = job(("", ""))
    end_to_end._check_equal(task, 0, {OURS: ours, PEER: dict(ours)})
    with pytest.raises(RuntimeError, match=f"{key} differ"):
        end_to_end._check_equal(task, 0, {OURS: ours, PEER: ours | {key: value}})


def test_responses_of_unequal_length_are_refused_even_when_both_agree():
    row = {"prompts": 2, "digest": "a", "responses": 4, "response_tokens": 18, "gradient_tokens": 18}
    with pytest.raises(RuntimeError, match="response_tokens differ"):
        end_to_end._check_equal(job(("", "")), 0, {OURS: row, PEER: dict(row)})
    end_to_end._check_equal(job(("", ""), NATURAL), 0, {OURS: row, PEER: row | {"response_tokens": 17}})


def test_table_gives_the_ratio_of_medians(tmp_path: Path):
    def made_up(name: str, seconds: float) -> dict:
        row = dict.fromkeys(COLUMNS, "made up") | {"work": EQUAL, "trainer": name, "seconds": seconds}
        return row | {"cpu_seconds": seconds / 2, "response_tokens": 100, "gradient_tokens": 100}

    rows = [made_up(OURS, s) for s in (1.0, 2.0, 9.0)] + [made_up(PEER, s) for s in (5.0, 4.0, 4.0)]
    write_rows(tmp_path / "made_up.csv", rows, COLUMNS)
    lines = end_to_end.table(read_rows(tmp_path / "made_up.csv")).splitlines()
    assert any(
        line.startswith(f"| {EQUAL} | {OURS} | 3 | 2.00 ") and line.endswith("| 2.00 | 2.00 |") for line in lines
    )
    assert any(
        line.startswith(f"| {EQUAL} | {PEER} | 3 | 4.00 ") and line.endswith("| 1.00 | 1.00 |") for line in lines
    )
