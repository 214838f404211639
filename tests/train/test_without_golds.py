"""Prompts without answers: objectives without a reward train on them, the others refuse before a model is loaded."""

from __future__ import annotations

import json

import pytest

from vold.data.prompts import show_hint
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl


@pytest.fixture
def on_prompts(world, load, tmp_path):
    """on_prompts(*overrides) -> two steps of rl on a file of chats that end with the user."""
    rows = json.loads((world.data / "train.json").read_text())
    path = tmp_path / "prompts.jsonl"
    chats = [{"messages": [{"role": "user", "content": row[0]["value"]}]} for row in rows]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    def build(*overrides: str):
        few = ["steps=2", "evaluation.every=0", "save_every=0", "objective.target_kl=null"]
        return load("rl", tmp_path / "run", *few, f"data.path={path}", "data.layout=messages", *overrides)

    return build


def test_opd_trains_on_them(on_prompts, layout):
    config = on_prompts("objective.preset=opd")
    train_rl(config)
    steps = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["kl_tokens"] == row["response_tokens"] > 0 for row in steps), "every response is distilled"
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in steps)


SCORED = """
def even(response_ids):
    right = sum(response_ids) % 4 == 0
    return {"score": float(right), "feedback": None if right else f"{sum(response_ids)} is no multiple of 4."}
"""


@pytest.mark.parametrize("preset", ["sdpo", "srpo"])
def test_a_reward_of_ones_own_teaches_a_student_that_teaches_itself(preset, on_prompts, layout, tmp_path, monkeypatch):
    """It says which sibling is right, and, where none is, in words what was wrong."""
    hints = []
    spy = lambda prompt, hint, **more: hints.append(hint) or show_hint(prompt, hint, **more)  # noqa: E731
    monkeypatch.setattr("vold.train.teachers.show_hint", spy)
    (tmp_path / "mine.py").write_text(SCORED)
    reward = [f"reward={{function: {tmp_path}/mine.py:even}}", "objective.routing_term=even", "objective.feedback=true"]
    config = on_prompts(f"objective.preset={preset}", "teacher=null", *reward)
    train_rl(config)
    steps = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2] and all(row["kl_tokens"] > 0 for row in steps)
    assert any(row["grad_norm"] > 0 and row["skipped"] == 0 for row in steps)
    assert all(hint.demonstration is not None or hint.feedback.endswith("no multiple of 4.") for hint in hints)
    assert {hint.demonstration is None for hint in hints} == {True, False}


@pytest.mark.parametrize("preset", ["grpo", "vold", "sdpo"])
def test_the_others_refuse_them(on_prompts, layout, preset, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vold.train.components.Trainer", loaded)
    with pytest.raises(ValueError, match=r"prompts.jsonl row 1: no answer to grade by"):
        train_rl(on_prompts(f"objective.preset={preset}"))
