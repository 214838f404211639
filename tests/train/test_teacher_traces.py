"""`vold traces` on a tiny world: the data card, duplicates, lost answers, and `vold sft` on what it writes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from packaging.version import Version

from vold.config import dump_config
from vold.run.run_dir import read_rows
from vold.train import teacher_traces
from vold.train.sft import train_sft
from vold.train.teacher_traces import generate_traces
from vold.types import Rollout


def test_traces_then_sft_on_them(load, tmp_path, layout):
    overrides = ["sampling.max_new_tokens=30", "prompts_per_shard=5", "max_tokens=64"]
    config = load("traces", tmp_path / "traces", *overrides)
    generate_traces(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    assert card["asked"] == 12 and card["failed"] == 0
    assert card["kept"] + card["truncated"] + card["too_long"] == 12
    assert card["sampling"]["temperature"] == 0.6
    assert Version(card["versions"]["torch"]).public == Version(torch.__version__).public
    assert card["kept"] > 0, "random weights end some answers"
    rows = load_dataset("parquet", data_files=str(config.run_dir / "traces" / "*.parquet"), split="train")
    assert len(rows) == card["kept"] and card["kept_tokens"] == sum(map(len, rows["response_ids"]))
    on_traces = [f"data={{path: {config.run_dir / 'traces'}, layout: traces}}", "steps=1"]
    student = load("sft", tmp_path / "sft", *on_traces)
    train_sft(student)
    assert read_rows(student.run_dir / "metrics.jsonl")[0]["loss"] > 0
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        generate_traces(config)


def test_traces_are_never_mixed_with_an_earlier_attempts(load, tmp_path, layout):
    """Answers without a finished step: nothing but the part file shows that there was a run."""
    config = load("traces", tmp_path / "traces", "sampling.max_new_tokens=6")
    part = config.run_dir / "traces" / "shard-00000.part.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text('{"prompts": "0123", "answers": []}\n')
    (config.run_dir / "config.yaml").write_text(dump_config(config, "traces"))
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        generate_traces(config)
    with pytest.raises(ValueError, match=r"shard-00000.part.jsonl answers other prompts than data.path now holds"):
        generate_traces(config, resume=True)
    with pytest.raises(ValueError, match=r"every prompt exceeds prompt.max_tokens = 3; raise it"):
        generate_traces(load("traces", tmp_path / "short", "prompt.max_tokens=3", "data.on_error=skip"))


def test_a_prompt_that_is_asked_twice_gets_one_trace(load, tmp_path, layout, world):
    rows = json.loads((world.data / "traces_prompts.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps([*rows, *rows[:5], {"no": "row"}]))
    overrides = [f"data.path={tmp_path / 'twice.json'}", "data.on_error=skip", "sampling.max_new_tokens=6"]
    config = load("traces", tmp_path / "traces", *overrides)
    generate_traces(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    unique = len({json.dumps(row) for row in rows})
    assert card["asked"] == unique and card["rows_skipped"] == 1
    assert card["duplicates_removed"] == len(rows) + 5 - unique


class LossySampler:
    """Has lost every third prompt's answer by the time it hands the others over."""

    def stream(self, prompts, config, *, responses, seed, answered):
        return ([Rollout(one, (7, 8), (0.0, 0.0), "stop", "")] for place, one in enumerate(prompts) if place % 3)


def test_answers_that_never_came_are_counted(load, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(teacher_traces, "open_sampler", lambda *_, **__: LossySampler())
    config = load("traces", tmp_path / "traces", "sampling.sequences_per_call=6", "prompts_per_shard=6")
    generate_traces(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    assert (card["asked"], card["kept"], card["failed"], card["kept_tokens"]) == (12, 8, 4, 16)


def test_responses_that_come_at_once_are_one_line(monkeypatch):
    """An engine may be silent for a minute and then give a whole call's responses, or one now and then."""
    clock = [0.0]
    monkeypatch.setattr(teacher_traces, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    shard = SimpleNamespace(prompts=[SimpleNamespace(id=str(n)) for n in range(6)], answered=set)

    def sizes(*, first: float, each: float) -> list[int]:
        def stream(prompts, *_, **__):
            clock[0] += first
            for prompt in prompts:
                yield [prompt]
                clock[0] += each

        responses = teacher_traces._responses(shard, SimpleNamespace(stream=stream), None, 6, 0)
        return [len(arrived) for arrived in responses]

    assert sizes(first=60.0, each=0.0) == [6]
    assert sizes(first=60.0, each=0.4) == [4, 2]
