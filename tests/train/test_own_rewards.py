"""`vold rl` with rewards of one's own: functions and a judge, what is logged, masked and counted, and resuming."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import vold
from support.chat_server import ChatServer
from support.runs import timeless
from vold.config.schema import RewardConfig
from vold.grading import Grader
from vold.objectives import build_objective
from vold.run.run_dir import read_rows
from vold.train.reward_function import GraderReward, StepGroups
from vold.train.reward_terms import check_reward_terms
from vold.train.rl import train_rl

FUNCTIONS = """
from neighbour import OFFSET

def vowels(response_text, metadata, gold):
    assert metadata == {"level": {"of": gold}, "day": "2026-01-02"}
    digits = sum(letter.isdigit() for letter in response_text)
    return {"score": OFFSET + digits / 10, "digits": digits, "odd": digits % 2}

def sevens(golds, response_ids):
    return [float(sum(ids) % 7) / 7 for ids in response_ids]

def fussy(response_ids):
    if sum(response_ids) % 3 == 0:
        raise RuntimeError(f"no reward for {sum(response_ids)}")
    return (sum(response_ids) % 5) / 5
"""
SHORT = ["steps=3", "save_every=2", "evaluation={}", "objective.preset=grpo", "samples_per_step=50"]


def scored(prompt: str) -> str:
    """A judge's answer that depends on the response."""
    return f"Good.\nScore: {len(prompt) % 11}"


@pytest.fixture
def functions(tmp_path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "neighbour.py").write_text("OFFSET = 0.5\n")
    (tmp_path / "mine" / "rewards.py").write_text(FUNCTIONS)
    return tmp_path / "mine" / "rewards.py"


@pytest.fixture
def with_columns(world, tmp_path) -> list[str]:
    """The problems in a table with a nested column and a date that nothing reads."""
    rows = [
        {
            "question": question["value"],
            "answer": (gold := answer["ground_truth"]["value"]),
            "level": {"of": gold},
            "day": datetime.date(2026, 1, 2),
        }
        for question, answer in json.loads(world.data.joinpath("train.json").read_text())
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return [f"data={{path: {tmp_path}/train.parquet, layout: vqa}}"]


def put_back_to_step_2(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    shutil.rmtree(run_dir / "model")
    (run_dir / "checkpoints" / "latest").write_text("step-000002\n")


def test_functions_and_a_judge_in_a_run_that_is_resumed(load, functions, with_columns, tmp_path, layout):
    with ChatServer(scored) as server:
        reward = {
            "function": {f"{functions}:vowels": 0.5, f"{functions}:sevens": 0.25},
            "judge": {"url": server.url, "model": "judge", "weight": 0.25, "template": "{prompt} {response} {day}"},
        }
        config = load("rl", tmp_path / "run", *SHORT, f"reward={json.dumps(reward)}", *with_columns)
        train_rl(config)
        rows, samples = (read_rows(config.run_dir / f"{name}.jsonl") for name in ("metrics", "samples"))
        for row in rows:
            parts = [row["reward_vowels"], row["reward_sevens"], row["reward_judge"]]
            assert row["reward"] == pytest.approx(0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2])
            assert row["reward_vowels"] == pytest.approx(0.5 + row["reward_vowels.digits"] / 10)
            assert (row["reward_vowels_errors"], row["reward_judge_errors"], row["broken"]) == (0, 0, 0)
            assert row["grad_norm"] > 0, "the rewards differ, and so do the advantages"
        for sample in samples:
            values = sample["values"]
            weights = {"vowels": 0.5, "sevens": 0.25, "judge": 0.25}
            assert sample["reward"] == pytest.approx(sum(weight * values[name] for name, weight in weights.items()))
            digits = sum(letter.isdigit() for letter in sample["response"])
            assert values["vowels.digits"] == digits and values["accuracy"] in (0.0, 1.0)
        files = json.loads((config.run_dir / "reward.json").read_text())["files"]
        assert set(files) == {str(functions), str(functions.with_name("neighbour.py"))}
        asked = len(server.asked)
        assert asked <= sum(row["prompts_sampled"] for row in rows) * 3

        put_back_to_step_2(config.run_dir)
        before = shutil.copytree(config.run_dir, tmp_path / "before")
        train_rl(config, resume=True)
        assert timeless(read_rows(config.run_dir / "metrics.jsonl")) == timeless(rows)
        assert len(server.asked) == asked, "its answers are on disk"

        shutil.rmtree(config.run_dir)
        shutil.copytree(before, config.run_dir)
        functions.with_name("neighbour.py").write_text("OFFSET = 0.6\n")
        with pytest.raises(ValueError, match=r"--resume: .*mine/neighbour.py has changed since the run began"):
            train_rl(config, resume=True)


def test_a_function_that_fails_is_masked_counted_and_shown(load, functions, tmp_path, layout, capsys):
    config = load("rl", tmp_path / "run", *SHORT, "steps=2", f"reward.function={functions}:fussy")
    train_rl(config)
    rows, samples = (read_rows(config.run_dir / f"{name}.jsonl") for name in ("metrics", "samples"))
    failed = sum(row["reward_fussy_errors"] for row in rows)
    assert 0 < failed < 24
    assert [row["broken"] for row in rows] == [row["reward_fussy_errors"] for row in rows]
    assert len(samples) == 24 - failed and all("fussy" in sample["values"] for sample in samples)
    lines = (config.run_dir / "reward.log").read_text().splitlines()
    assert len(lines) == failed
    assert all(" fussy: RuntimeError: no reward for " in line and "(rewards.py line 14)" in line for line in lines)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "reward fussy failed" in line]
    assert len(warnings) == 1 and "such responses are masked and counted (reward_fussy_errors)" in warnings[0]


def test_a_function_of_python_and_a_key_of_what_it_returns_routes(load, functions, with_columns, tmp_path, layout):
    rl = str(Path(vold.__file__).parent / "miniature" / "configs" / "rl.yaml")
    assert vold.load_config(rl, reward=f"{functions}:vowels").reward.weights["vowels"] == 1.0
    routing = ["objective.preset=vold", "objective.routing_term=vowels.odd", *with_columns]
    config = load("rl", tmp_path / "run", *SHORT, "steps=1", *routing)
    train_rl(config, reward=f"{functions}:vowels")
    samples = read_rows(config.run_dir / "samples.jsonl")
    assert {sample["mean_kl"] is None for sample in samples} == {True, False}
    for sample in samples:
        assert (sample["mean_kl"] is None) == (sample["values"]["vowels.odd"] == 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.function=none.py:f"], r"reward.function = none.py:f: none.py does not exist"),
        (["objective={preset: vold, routing_term: style}"], "'style' is no term of the reward; choose one of accuracy"),
        (["reward.judge={url: 'http://h/v1', model: m, template: '{response} {why}'}"], r"\{why\} is none of prompt"),
        (["reward.judge={url: 'http://h/v1', model: m, api_key_env: VOLD_NO_KEY}"], "no such variable; export it"),
        (["reward.function=FILE:seven"], r"rewards.py:seven: the file has no function 'seven'"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(load, functions, tmp_path, layout, overrides, message):
    config = load("rl", tmp_path / "run", *[override.replace("FILE", str(functions)) for override in overrides])
    with pytest.raises(ValueError, match=message) as error:
        train_rl(config)
    assert "\n" not in str(error.value)


def test_no_code_is_taken_from_a_checkpoint(load, world, tmp_path):
    config = load("rl", tmp_path / "run", f"reward.function={world.student}/reward.py:f")
    (world.student / "reward.py").write_text("def f(gold): return 1\n")
    try:
        with pytest.raises(ValueError, match=r"the file lies in student = .*, from which no code is run"):
            check_reward_terms(config, build_objective(config.objective, 8))
    finally:
        (world.student / "reward.py").unlink()


class NotANumber(GraderReward):
    """A RewardFunction from Python that goes wrong on some responses."""

    def assign_rewards(self, step, step_groups):
        from dataclasses import replace

        groups = [
            replace(group, rewards=(float("nan"), float("inf"), *group.rewards[2:])) for group in step_groups.groups
        ]
        return StepGroups(groups, step_groups.metrics)


def test_rewards_that_are_not_finite_are_masked_and_counted(load, tmp_path, layout, capsys):
    config = load("rl", tmp_path / "run", *SHORT, "steps=1", "objective.preset=vold")
    train_rl(config, reward_function=NotANumber)
    (row,) = read_rows(config.run_dir / "metrics.jsonl")
    assert row["rewards_not_finite"] == row["broken"] == 8
    assert row["loss"] == row["loss"] and row["reward"] == row["reward"], "finite"
    assert "8 rewards are NaN or infinite; their responses are masked" in capsys.readouterr().err


def test_a_grader_gives_own_terms_nothing_to_break(load):
    """Data without gold answers: the grader breaks on each, and a reward that does not ask it is whole."""
    from vold.train.reward_function import PendingGroup
    from vold.types import Prompt, Rollout

    rollout = Rollout(Prompt("p", (1,), "Write a poem."), (2,), (-1.0,), "stop", "Roses.")
    with Grader() as grader:
        verdicts = grader.grade([("Roses.", "", False)])
    config = RewardConfig(function="a.py:poem")
    pending = PendingGroup([rollout], verdicts, [{"format": 0.0, "poem": 0.75}], [])
    assert pending.finish(config, None).rewards == (0.75,)
    assert pending.finish(config, "accuracy").rewards == (None,)
    assert pending.finish(RewardConfig(function="a.py:poem", accuracy=0.5), None).rewards == (None,)
