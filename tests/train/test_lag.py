"""Rollouts several steps ahead: how old they may be, what goes on side by side, and what a resumed run repeats."""

# ruff: noqa: F811 - fixtures that this file shares with another

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from test_rollout_schedule import MadeUp, graded_by_length, open_made_up, reward_by_length  # noqa: F401 - fixtures

from support.fake_engine import FakeEngine
from vold.config.schema import CurriculumConfig, ObjectiveConfig, RewardConfig, VllmConfig
from vold.data.order import rows_of_step
from vold.data.problems import load_problems
from vold.objectives import build_objective
from vold.report.timeline import Interval, idle_shares
from vold.rollout.vllm.remote import RemoteEngines
from vold.rollout.vllm.sampler import VllmSampler
from vold.run.run_dir import read_rows
from vold.run.timers import PhaseTimers
from vold.teacher.vllm import VllmTeacher
from vold.train import rollout_worker
from vold.train.group_metrics import staleness_metrics
from vold.train.rl import train_rl
from vold.train.rollout_worker import RolloutWorker, SamplingRequest
from vold.types import Group, Prompt, Rollout

PATIENCE = 60.0
ENGINE = ["rollout.engine=vllm", "rollout.vllm.urls=[http://e:1]"]


def test_no_token_is_older_than_the_lag_and_a_resumed_run_asks_for_the_same_prompts(
    load, tmp_path, layout, graded_by_length
):
    config = load("rl", tmp_path / "run", "steps=6", "evaluation.every=3", "save_every=3", "rollout.lag=3")
    train_rl(config)
    rows, asked = (read_rows(config.run_dir / name) for name in ("metrics.jsonl", "prompts.jsonl"))
    ages = [row["staleness_max"] for row in rows]
    assert ages[0] == 0 and max(ages) <= 3 and all(age >= 1 for age in ages[1:])
    assert all(0 < row["effective_sample_size"] <= 1 for row in rows) and rows[0]["mismatch_max"] < 1e-4
    ids = [row["prompt_id"] for row in asked]
    rows_of_data = len(load_problems(config.data))
    order = [row for step in range(6) for row in rows_of_step(step, rows=rows_of_data, per_step=4, seed=config.seed)]
    assert len({int(name.rpartition(":")[2]) - row for name, row in zip(ids, order, strict=True)}) == 1, (
        "as without lag"
    )
    steering = json.loads((config.run_dir / "checkpoints" / "step-000003" / "steering.json").read_text())
    assert [len(rows) for rows in steering["prompts"]["ahead"]] == [4, 4, 4], "of the next three steps"
    (config.run_dir / "checkpoints" / "latest").write_text("step-000003\n")
    train_rl(config, resume=True)
    again = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["prompt_id"] for row in read_rows(config.run_dir / "prompts.jsonl")] == ids
    assert again[3]["staleness_max"] == 0 and again[3]["mismatch_max"] < 1e-4 and len(again) == 6


def test_sampling_waits_where_tokens_could_become_older(open_made_up, tmp_path):
    made_up = MadeUp(tmp_path)
    with open_made_up(made_up, lag=3) as rollouts:
        for step in range(9):
            rollouts.next(step)
            assert len(made_up.asked) == min(step + 4, 9)


def test_a_resumed_curriculum_takes_the_rows_that_were_under_way(open_made_up, tmp_path):
    """They were taken before the pass rates of the steps in between were known."""
    settings = dict(curriculum=CurriculumConfig(highest=0.9), lag=2)
    with open_made_up(MadeUp(tmp_path), rows=12, **settings) as rollouts:
        found, states = [], []
        for step in range(9):
            found.append([group.prompt.id for group in rollouts.next(step).groups])
            states.append(json.loads(json.dumps(rollouts.state)))
    resumed = open_made_up(MadeUp(tmp_path), rows=12, done=4, **settings)
    resumed._restore(states[3])
    with resumed:
        assert [[g.prompt.id for g in resumed.next(step).groups] for step in range(4, 9)] == found[4:]


def test_a_batch_is_scored_while_the_next_one_is_sampled(load, open_made_up, tmp_path, monkeypatch):
    """A teacher that answers for step 1 when step 2 is being sampled: with one step ahead nobody would get there."""
    monkeypatch.setattr(rollout_worker, "grade_group", reward_by_length)
    second_begins = threading.Event()

    class Slow:
        def stream(self, prompts, config, *, responses, seed):
            if prompts[0].id in ids[2]:
                second_begins.set()
            for prompt in prompts:
                yield [Rollout(prompt, (1, 2), (-1.0, -1.0), "stop", "", 1) for _ in range(responses)]

    class Teacher:
        def scores(self, prompt):
            return True

        def submit(self, rollouts):
            assert rollouts[0].prompt.id not in ids[1] or second_begins.wait(PATIENCE)
            answer: Future = Future()
            answer.set_result([(-2.0,) * len(rollout.response_ids) for rollout in rollouts])
            return answer

        def close(self):
            pass

    made_up = MadeUp(tmp_path)
    with open_made_up(made_up, lag=2) as plain:
        ids = [{group.prompt.id for group in plain.next(step).groups} for step in range(3)]
    objective = build_objective(ObjectiveConfig(preset="vold-unmasked"), 40)
    config = load("rl", tmp_path / "run").rollout.model_copy(update={"responses_per_prompt": 2})
    worker = RolloutWorker(Slow(), made_up, objective, config, RewardConfig(), Teacher())
    made_up.sample_groups = worker.sample_groups
    made_up.teacher = worker.teacher
    made_up.log.phase.thread = lambda name: made_up.log.phase
    with open_made_up(made_up, lag=2) as rollouts:
        found = [rollouts.next(step).groups for step in range(3)]
    assert all(rollout.logp_teacher is not None for groups in found for g in groups for rollout in g.rollouts)


def test_the_age_of_a_response_is_that_of_its_tokens():
    prompt = Prompt("p", (1,), "")
    three = dict(response_ids=(3, 4, 5), logp_rollout=(-1.0,) * 3, finish_reason="stop", text="")
    whole, mixed = Rollout(prompt, **three, version=4), Rollout(prompt, **three, version=2, versions=(2, 2, 5))
    assert mixed.versions.dtype == "int32" and mixed != Rollout(prompt, **three, version=2)
    group = Group(prompt, (whole, mixed), (), ())
    found = staleness_metrics([group], updates=5)
    assert found == pytest.approx({"staleness_mean": (2 + 3) / 2, "staleness_max": 4, "responses_continued": 0.5})
    assert "responses_continued" not in staleness_metrics([Group(prompt, (whole,), (), ())], updates=5)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rollout.dynamic_sampling={}"], "does not sample in the place of groups that are dropped"),
        (
            ["adapter={rank: 2, sync: adapter}", *ENGINE],
            "whole weights",
        ),
        (["vision.train_merger=true", *ENGINE], "older vision tower"),
        (["rollout.engine=vllm"], "needs engines that do not share the trainer's GPU"),
    ],
)
def test_what_does_not_go_with_sampling_over_weight_syncs_is_refused(load, tmp_path, layout, overrides, line):
    with pytest.raises(ValueError, match=rf"rollout.lag = 2 .*{line}.*, or set rollout.lag="):
        train_rl(load("rl", tmp_path / "run", "rollout.lag=2", *overrides))


# -- the order of events with engines behind HTTP ----------------------------------------------------------------------


@pytest.fixture
def engines():
    found = SimpleNamespace(policy=FakeEngine(), teacher=FakeEngine())
    yield found
    found.policy.stop()
    found.teacher.stop()


def test_at_lag_0_a_group_is_scored_before_its_neighbours_are_sampled(
    load, engines, world, tmp_path, monkeypatch, layout
):
    """The policy's engine holds the second prompt until the teacher's has answered for the first. The timeline has
    both at once, and the teacher's idle share."""
    monkeypatch.setattr(rollout_worker, "grade_group", reward_by_length)
    remote = dict(weights_dir=tmp_path, restart_seconds=0.0)
    sampler = VllmSampler(world.student, RemoteEngines(world.student, VllmConfig(urls=(engines.policy.url,), **remote)))
    settings = VllmConfig(urls=(engines.teacher.url,), **remote)
    teacher = VllmTeacher(world.teacher, settings, temperature=1.0)
    objective = build_objective(ObjectiveConfig(preset="vold-unmasked"), 40)
    config = load("rl", tmp_path / "run").rollout.model_copy(update={"responses_per_prompt": 2, "engine": "vllm"})
    phase = PhaseTimers()
    busy = phase.beside("teacher")
    worker = RolloutWorker(sampler, None, objective, config, RewardConfig(), teacher, busy=busy)
    prompts = [Prompt("quick", (8, 9), ""), Prompt("slow", (5, 9), "")]
    engines.policy.held = {5}
    before = engines.teacher.answered

    def release() -> None:
        deadline = time.monotonic() + PATIENCE
        while engines.teacher.answered < before + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        released.append(engines.teacher.answered - before)
        engines.policy.held = set()

    released: list[int] = []
    watching = threading.Thread(target=release)
    watching.start()
    found = worker.sample_groups([SamplingRequest(0, prompts, 0)], phase, lambda line: None)
    watching.join()
    assert released == [2], "both responses of the first, while the second had none"
    scores = [rollout.logp_teacher.tolist() for i in (0, 1) for rollout in found.groups[i].rollouts]
    assert scores == [pytest.approx([-0.01], rel=1e-5)] * 4, "a token each: the fake answers with its end"
    phase.finish_step()
    first = next(i for i in phase.intervals if i.thread == "teacher")
    assert any(i.name == "rollout" and i.start < first.end < i.end for i in phase.intervals), "both at once"
    shares = idle_shares([Interval(*interval) for interval in phase.intervals])
    assert 0 < shares["teacher"] < 1 and shares["sampler"] < 1
    teacher.close()


def test_calls_side_by_side_are_one_stretch_of_work():
    timers = PhaseTimers()
    busy = timers.beside("teacher")
    busy.begin()
    busy.begin()
    busy.end()
    busy.end()
    busy.begin()
    busy.end()
    timers.finish_step()
    first, second = timers.intervals
    assert first.thread == second.name == "teacher" and first.end <= second.start
    assert torch.tensor([first.end - first.start, second.end - second.start]).min() >= 0
