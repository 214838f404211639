"""Where a step's groups come from: lag, groups whole or dropped, dynamic sampling, a teacher asked on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.runs import same_tensors, timeless
from vold.config.schema import CurriculumConfig, DynamicSamplingConfig, ObjectiveConfig
from vold.data.order import rows_of_step
from vold.data.packing import encode_text, pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.grading import Grader
from vold.models.checkpoint_dir import short_name
from vold.models.tokenizer import load_tokenizer
from vold.objectives import build_objective
from vold.rollout import TransformersSampler
from vold.run.run_dir import RunLog, read_rows
from vold.run.step_profiler import StepProfiler
from vold.run.timers import PhaseTimers
from vold.teacher import Teacher
from vold.train import components, rollout_worker, teachers
from vold.train.reward_function import GraderReward
from vold.train.rl import train_rl
from vold.train.rollout_schedule import RolloutSchedule, StepPlan
from vold.train.rollout_worker import PromptBatch, RankRollouts, RolloutWorker, sampling_requests
from vold.train.teacher_coverage import mask_unscored, teacher_metrics
from vold.trainer.trainer import Trainer
from vold.types import Group, Prompt, Rollout, Verdict

SHORT = ["steps=3", "evaluation.every=0", "save_every=0"]


def reward_by_length(rollouts, *_) -> Group:
    """An untrained student never answers; the parity of its lengths gives groups of mixed rewards."""
    rewards = tuple(float(len(rollout.response_ids) % 2) for rollout in rollouts)
    verdicts = tuple(Verdict("correct" if reward else "wrong", None, "length") for reward in rewards)
    return Group(rollouts[0].prompt, tuple(rollouts), verdicts, rewards)


@pytest.fixture
def graded_by_length(monkeypatch):
    monkeypatch.setattr(rollout_worker, "grade_group", reward_by_length)


def weights_of(run_dir: Path, steps: int = 3) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{steps:06d}" / "rank-00000.safetensors")


def by_hand(config, layout) -> dict[str, torch.Tensor]:
    """The parameters after config.steps updates, each on rollouts of the weights `lag` updates before."""
    tokenizer, cpu = load_tokenizer(config.student), torch.device("cpu")
    prompts = build_prompts(load_problems(config.data), tokenizer, config.prompt)
    numbers = dict(dtype=torch.float32, vocab_size=len(tokenizer))
    lag, objective = config.rollout.lag, build_objective(config.objective, config.rollout.max_new_tokens)
    cap = config.rollout.importance_cap if lag else None
    numbers_of_loss = {"objective": objective, "importance_cap": cap}
    trainer = Trainer(config.student, layout, config.optimizer, steps=config.steps, **numbers_of_loss, **numbers)
    teacher = Teacher(config.teacher, layout, **numbers)
    sampler = TransformersSampler(config.student, dtype=torch.float32, device=cpu)
    policies = []
    for step in range(config.steps):
        policies.append({name: weight.clone() for name, weight in trainer.weights()})
        sampler.load_weights(policies[max(step - lag, 0)].items())
        rows = rows_of_step(step, rows=len(prompts), per_step=config.prompts_per_step, seed=config.seed)
        seed = int(np.random.SeedSequence([config.seed, step, 0]).generate_state(1)[0])
        asked = [prompts[row] for row in rows]
        rollouts = sampler.sample(asked, config.rollout, responses=3, seed=seed)
        graded = [reward_by_length(rollouts[first : first + 3]) for first in range(0, len(rollouts), 3)]
        batch = pack(
            objective.assign_token_weights(graded), max_tokens=config.microbatch_tokens, replicas=trainer.replicas
        )
        trainer.step(teacher.score(batch))
    return {short_name(name): weight.clone() for name, weight in trainer.weights()}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_is_the_loop_written_out_bit_for_bit(load, tmp_path, layout, graded_by_length, lag):
    """Also where the next step's rollouts are drawn by a thread while this one trains."""
    config = load("rl", tmp_path / "run", *SHORT, f"rollout.lag={lag}")
    train_rl(config)
    saved = load_file(config.run_dir / "model" / "model.safetensors")
    found, expected = {short_name(name): tensor for name, tensor in saved.items()}, by_hand(config, layout)
    trained = expected.keys() & found.keys()
    assert len(trained) > 10 and all(torch.equal(found[name], expected[name]) for name in trained)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["staleness_max"] for row in rows] == [row["staleness_mean"] for row in rows] == [0, lag, lag]
    assert all(("effective_sample_size" in row) == bool(lag) for row in rows)
    if lag:
        assert rows[0]["mismatch_max"] < 1e-4 < 1e-2 < rows[1]["mismatch_max"]
        assert 0.999 < rows[0]["effective_sample_size"] <= 1.0 and rows[1]["effective_sample_size"] < 0.999


def test_the_next_steps_rollouts_are_drawn_while_a_step_trains(load, tmp_path, layout, monkeypatch):
    """Training waits inside a step for a drawing to begin, and the drawing for training: neither comes alone."""
    meet = threading.Barrier(2, timeout=60.0)
    step, draw, passages = Trainer.step, RolloutWorker.sample_groups, []

    def training(trainer, batch, **asked):
        if trainer.schedule.num_steps < 2:  # the last step's are the last to be drawn
            meet.wait()
        return step(trainer, batch, **asked)

    def drawing(*args):
        if threading.current_thread() is not threading.main_thread():
            meet.wait()
        return draw(*args)

    class Kept(StepProfiler):
        def __init__(self):
            super().__init__(SimpleNamespace(step=lambda: None))

        def step(self, row, intervals):
            passages.append({(interval.name, interval.thread) for interval in intervals})
            super().step(row, intervals)

    monkeypatch.setattr(Trainer, "step", training)
    monkeypatch.setattr(RolloutWorker, "sample_groups", drawing)
    train_rl(load("rl", tmp_path, *SHORT, "rollout.lag=1"), profiler=Kept())
    main = PhaseTimers.MAIN_THREAD
    assert ("rollout", main) in passages[0] and ("rollout_wait", main) in passages[1]
    assert all(("rollout", "rollout") in found for found in passages[:2])
    assert ("rollout", "rollout") not in passages[2] and all(("train", main) in found for found in passages)


def test_sampler_and_grader_have_one_user_at_a_time(load, tmp_path, layout, monkeypatch):
    """The thread, which here begins when a step is trained, the weight sync with its probe, an evaluation."""
    busy, trained = threading.Lock(), threading.Event()
    step, draw = Trainer.step, RolloutWorker.sample_groups

    def training(trainer, batch, **asked):
        report = step(trainer, batch, **asked)
        trained.set()
        return report

    def drawing(*args):
        if threading.current_thread() is not threading.main_thread():
            assert trained.wait(60.0)
            trained.clear()
        return draw(*args)

    def alone(function):
        def called(*args, **kwargs):
            assert busy.acquire(blocking=False), "two threads at once"
            try:
                return function(*args, **kwargs)
            finally:
                busy.release()

        return called

    for name in ("_generate", "score", "load_weights"):
        monkeypatch.setattr(TransformersSampler, name, alone(getattr(TransformersSampler, name)))
    monkeypatch.setattr(Grader, "grade", alone(Grader.grade))
    monkeypatch.setattr(Trainer, "step", training)
    monkeypatch.setattr(RolloutWorker, "sample_groups", drawing)
    config = load("rl", tmp_path / "run", *SHORT, "rollout.lag=1", "evaluation.every=1")
    train_rl(config)
    assert all("accuracy_image" in row for row in read_rows(config.run_dir / "metrics.jsonl"))


def test_resumed_at_lag_1_the_first_step_is_strict(load, tmp_path, layout, graded_by_length):
    """What was on its way when the run was saved is drawn anew, for the same prompts and with the weights of now."""
    config = load("rl", tmp_path / "run", *SHORT, "steps=4", "rollout.lag=1", "save_every=2")
    train_rl(config)
    whole = read_rows(config.run_dir / "metrics.jsonl")
    asked = [row["prompt_id"] for row in read_rows(config.run_dir / "prompts.jsonl")]
    (config.run_dir / "checkpoints" / "latest").write_text("step-000002\n")
    train_rl(config, resume=True)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["staleness_max"] for row in whole] == [0, 1, 1, 1]
    assert [row["staleness_max"] for row in rows] == [0, 1, 0, 1]
    assert rows[2]["mismatch_max"] < 1e-4
    assert timeless(rows[:2]) == timeless(whole[:2])
    assert [row["prompt_id"] for row in read_rows(config.run_dir / "prompts.jsonl")] == asked


def test_a_run_that_draws_ahead_ends_when_it_is_asked_to(load, tmp_path, layout, monkeypatch):
    """SIGTERM in step 1: that step is finished and saved, and the thread leaves nothing behind."""
    config, step = load("rl", tmp_path / "run", *SHORT, "rollout.lag=1"), Trainer.step

    def interrupted(trainer, batch, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch, **options)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(Trainer, "step", interrupted)
        train_rl(config)
    assert ended.value.code == 143 and not any(thread.name.startswith("rollout") for thread in threading.enumerate())
    train_rl(config, resume=True)
    assert [row["staleness_max"] for row in read_rows(config.run_dir / "metrics.jsonl")] == [0, 0, 1]


# -- samplers that finish in another order, or not at all ------------------------------------------------------------


@pytest.fixture
def sampler_that(monkeypatch):
    """sampler_that(change): what `change(step's groups)` leaves of each stream is what comes."""
    opened = components.open_sampler

    def install(change) -> None:
        def open_changed(*args, **kwargs):
            sampler = opened(*args, **kwargs)
            stream = sampler.stream
            sampler.stream = lambda *a, **k: iter(change(list(stream(*a, **k))))
            return sampler

        monkeypatch.setattr(components, "open_sampler", open_changed)

    return install


def test_the_order_in_which_groups_finish_changes_nothing(load, tmp_path, layout, graded_by_length, sampler_that):
    plain = load("rl", tmp_path / "plain", *SHORT)
    train_rl(plain)
    sampler_that(lambda found: found if len(found[0]) == 1 else random.Random(1).sample(found, len(found)))
    shuffled = load("rl", tmp_path / "shuffled", *SHORT)
    train_rl(shuffled)
    one, other = (config.run_dir / "checkpoints/step-000003/rank-00000.safetensors" for config in (plain, shuffled))
    assert same_tensors(one, other)
    assert read_rows(plain.run_dir / "samples.jsonl") == read_rows(shuffled.run_dir / "samples.jsonl")


def test_an_engine_that_batches_by_itself_is_asked_everything_at_once(load, tmp_path):
    config = load("rl", tmp_path, "rollout.sequences_per_call=6").rollout
    batch = PromptBatch(0, 0, 0, [Prompt(str(number), (1,), "") for number in range(7)])
    sizes = lambda config, ranks: [len(r.prompts) for r in sampling_requests(batch, config, ranks, seed=0)]  # noqa: E731
    assert sizes(config, 1) == [2, 2, 2, 1]
    assert sizes(config.model_copy(update={"engine": "vllm"}), 1) == [7]
    assert sizes(config.model_copy(update={"engine": "vllm"}), 2) == [4, 3]


@pytest.mark.parametrize(
    ("engine", "key"), [("rollout.engine=vllm", "rollout.vllm.urls"), ("teacher_engine=vllm", "teacher_vllm.urls")]
)
def test_an_engine_beside_the_trainer_cannot_work_while_it_trains(load, tmp_path, layout, engine, key):
    with pytest.raises(
        ValueError, match=f"rollout.lag = 1 needs engines .* and name them in {key}, or set rollout.lag=0"
    ):
        train_rl(load("rl", tmp_path, "rollout.lag=1", engine))


@pytest.mark.parametrize("lag", [0, 1])
def test_a_lost_group_is_dropped_whole_and_counted(
    load, tmp_path, layout, graded_by_length, sampler_that, monkeypatch, lag
):
    notes: list[str] = []
    monkeypatch.setattr(RunLog, "show_status", lambda log, note: notes.append(note))
    sampler_that(lambda found: found[1:])
    config = load("rl", tmp_path / "run", *SHORT, f"rollout.lag={lag}", "objective.preset=vold-unmasked")
    train_rl(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["groups_lost"] == 1 and row["prompts_sampled"] == 4
        assert row["kl_tokens"] == row["response_tokens"], "the normaliser and the loss know three groups"
    asked = read_rows(config.run_dir / "prompts.jsonl")
    assert [row["pass_rate"] is None for row in asked] == [True, False, False, False] * 3
    running = [re.fullmatch(r"rollout: (\d) of 4 prompts running, \d+ tok/s", note) for note in notes if note]
    assert [int(found[1]) for found in running] == [3, 2, 1] * 3 and notes[3::4] == [""] * 3


def test_without_a_group_nothing_is_trained_and_several_such_steps_end_the_run(
    load, tmp_path, layout, graded_by_length, sampler_that, capfd
):
    """Steps 2 to 4 of five get none; the optimizer is left as step 1 made it."""
    steps = iter(range(99))
    sampler_that(lambda found: found if len(found[0]) == 1 or next(steps) < 1 else [])
    config = load("rl", tmp_path / "run", "steps=5", "evaluation.every=0", "save_every=1")
    with pytest.raises(ValueError) as error:
        train_rl(config)
    said = "no group of responses is left for 3 steps in a row (optimizer.max_bad_steps); no parameter was changed"
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert capfd.readouterr().err.count("vold: no group of responses is left; this step trains nothing\n") == 3
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1] and [row["groups_lost"] for row in rows] == [0, 4, 4]
    assert "reward" in rows[0] and "reward" not in rows[1]
    first, third = weights_of(config.run_dir, 1), weights_of(config.run_dir, 3)
    state = lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("random")}  # noqa: E731
    assert all(torch.equal(tensor, third[name]) for name, tensor in state(first).items())


# -- a teacher that is asked as groups finish ------------------------------------------------------------------------


class TeacherBeside:
    """Answers as a vLLM teacher does, from transformers' model. `fails(number)`: which of the asked responses do."""

    def __init__(self, checkpoint: Path, fails=lambda number: False):
        self._model = TransformersSampler(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        self._fails, self.asked, self.closed = fails, [], False

    def scores(self, prompt) -> bool:
        return True

    def submit(self, rollouts) -> Future:
        found: Future = Future()
        answers = []
        for rollout in rollouts:
            failed = self._fails(len(self.asked))
            self.asked.append(rollout)
            answers.append(None if failed else tuple(self._model.score(rollout.prompt, rollout.response_ids)))
        found.set_result(answers)
        return found

    def close(self) -> None:
        self.closed = True


def run_with_teacher(load, monkeypatch, run_dir, teacher, *overrides: str):
    urls = "teacher_vllm.urls=[http://teacher:1]"
    monkeypatch.setattr(teachers, "VllmTeacher", lambda *_, **__: teacher)
    config = load("rl", run_dir, *SHORT, "teacher_engine=vllm", urls, *overrides)
    train_rl(config)
    return read_rows(config.run_dir / "metrics.jsonl")


@pytest.mark.parametrize("lag", [0, 1])
def test_a_streamed_teacher_trains_like_the_one_in_the_trainer(
    load, tmp_path, layout, world, graded_by_length, monkeypatch, lag
):
    overrides = [f"rollout.lag={lag}", "objective.beta=0.3"]
    inside = load("rl", tmp_path / "inside", *SHORT, *overrides)
    train_rl(inside)
    expected = read_rows(inside.run_dir / "metrics.jsonl")
    teacher = TeacherBeside(world.teacher)
    rows = run_with_teacher(load, monkeypatch, tmp_path / "beside", teacher, *overrides)
    for row, wanted in zip(timeless(rows), timeless(expected), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert {len(rollout.response_ids) % 2 for rollout in teacher.asked} == {0}, "failed responses alone"
    assert 0 < rows[0]["teacher_saved"] < 1 and teacher.closed


def test_two_halves_of_a_teacher_train_like_the_whole(load, tmp_path, layout, world, graded_by_length, monkeypatch):
    whole = load("rl", tmp_path / "whole", *SHORT, "objective.beta=0.3")
    train_rl(whole)
    monkeypatch.setattr(teachers, "VllmTeacher", lambda path, *_, **__: TeacherBeside(path))
    half = f"{{path: {world.teacher}, weight: 0.5, vllm: {{urls: [http://teacher:1]}}}}"
    several = ["teacher=null", f"teachers={{one: {half}, other: {half}}}", "teacher_column=who"]
    halves = load("rl", tmp_path / "halves", *SHORT, "objective.beta=0.3", *several)
    assert halves.teachers["one"].vllm.secret_file == halves.run_dir / "engines.secret"
    train_rl(halves)
    expected, rows = (read_rows(config.run_dir / "metrics.jsonl") for config in (whole, halves))
    for row, wanted in zip(timeless(rows), timeless(expected), strict=True):
        by_teacher = {name: row.pop(name) for name in list(row) if re.match("teacher_(one|other)_", name)}
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert by_teacher["teacher_one_responses"] == by_teacher["teacher_other_responses"] > 0
        assert by_teacher["teacher_one_kl"] > 0
    assert "teachers.one/config.json" in (halves.run_dir / "inputs.jsonl").read_text()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["teachers={a: {path: x}}"], "teacher and teachers are both set"),
        (["teacher_column=who"], "teacher_column = 'who' chooses among teachers"),
        (["teacher=null", "teachers={a-b: {path: x}}"], "teachers.a-b is no name"),
    ],
)
def test_several_teachers_and_one_are_one_decision(load, tmp_path, overrides, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        load("rl", tmp_path, *overrides)


def test_the_teacher_is_asked_while_others_are_still_drawn(
    load, tmp_path, layout, world, graded_by_length, monkeypatch, sampler_that
):
    """A sampler that draws a group at a time, and notes when: each is submitted before the next is drawn."""
    events: list[str] = []

    def noted(found):
        for group in found:
            if len(group) > 1:
                events.append("drawn")
            yield group

    sampler_that(noted)
    teacher = TeacherBeside(world.teacher)
    submit = teacher.submit
    teacher.submit = lambda rollouts: (events.append("asked"), submit(rollouts))[1]
    run_with_teacher(load, monkeypatch, tmp_path, teacher, "steps=2", "objective.preset=vold-unmasked")
    assert events == ["drawn", "asked"] * 8


def test_nothing_is_asked_where_nothing_is_distilled(load, tmp_path, layout, world, graded_by_length, monkeypatch):
    teacher = TeacherBeside(world.teacher)
    rows = run_with_teacher(load, monkeypatch, tmp_path, teacher, "objective.preset=grpo", "objective.beta=0")
    assert not teacher.asked and all(row["teacher_saved"] == 1.0 for row in rows)


def test_a_failed_teacher_call_masks_its_response(load, tmp_path, layout, world, monkeypatch):
    """Every reward is 0, so all that is learnt comes from the teacher: without its answer, nothing of a response."""
    teacher = TeacherBeside(world.teacher, fails=lambda number: number % 4 == 1)
    rows = run_with_teacher(load, monkeypatch, tmp_path, teacher)
    per_step = len(teacher.asked) // 3
    answered = sum(len(rollout.response_ids) for number, rollout in enumerate(teacher.asked) if number % 4 != 1)
    assert [row["teacher_failed"] for row in rows] == [per_step / 4] * 3
    assert sum(row["kl_tokens"] for row in rows) == sum(row["gradient_tokens"] for row in rows) == answered


def test_a_masked_response_stays_in_its_groups_baseline():
    prompt = Prompt("p", (1, 2), "")
    rollouts = tuple(
        Rollout(prompt, (3,) * 2, (-1.0,) * 2, "stop", "", logp_teacher=scores) for scores in (None, (), (-2.0, -3.0))
    )
    verdicts = (Verdict("correct", None, ""), Verdict("wrong", None, ""), Verdict("wrong", None, ""))
    group = Group(prompt, rollouts, verdicts, (1.0, 0.0, 0.0))
    weighed = build_objective(ObjectiveConfig(preset="vold", beta=0.6), 40).assign_token_weights([group])
    samples = mask_unscored(weighed)
    assert [s.pg_weight for s in samples] == pytest.approx([1 / 6, 0, 1 / 6])
    assert [s.kl_weight for s in samples] == pytest.approx([0, 0, 0.1])
    assert samples[0].advantage == pytest.approx(2 / 3 / np.std([1, 0, 0], ddof=1), rel=1e-5), "of three rewards"
    assert teacher_metrics(weighed, encode_text.length)["teacher_failed"] == 1
    [micro] = pack(samples, max_tokens=99).micro_batches
    assert micro.logp_teacher_N.tolist() == [0, 0, -2, -3] and micro.kl_weight_N[:2].tolist() == [0, 0]


# -- dynamic sampling and curriculum, on made-up groups --------------------------------------------------------------


class MadeUp:
    """A job of `ranks` and workers whose groups are a function of the prompt and of the seed. `shard` and `gather`
    are those of rank 0; the other ranks' groups are drawn in `gather`."""

    def __init__(self, tmp_path: Path, ranks: int = 1, lost: tuple[str, ...] = ()):
        self.world_size, self.layout, self._lost, self.asked = (
            ranks,
            SimpleNamespace(device=torch.device("cpu")),
            lost,
            [],
        )
        self.objective = build_objective(ObjectiveConfig(preset="grpo"), 40)
        self.path, self.teacher, self.stop = tmp_path / "prompts.jsonl", None, SimpleNamespace(set=lambda: None)
        self.log = SimpleNamespace(log_prompts=self.write, read_prompt_log=self.read, show_status=print)
        self.log.phase = lambda name: nullcontext()
        self.log.phase.thread = lambda name: name

    def write(self, step, rows):
        with self.path.open("a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def read(self):
        return read_rows(self.path) if self.path.exists() else []

    def broadcast(self, value):
        return value

    @property
    def reward_function(self):
        return GraderReward(self, self)

    def grade(self, items):
        raise AssertionError("made-up groups come with their verdicts")

    def shard(self, requests):
        self._requests = requests
        self.asked.append([prompt.id for request in requests for prompt in request.prompts])
        return requests[:: self.world_size]

    def gather(self, local):
        others = (self._requests[rank :: self.world_size] for rank in range(1, self.world_size))
        return [*local, *map(self.sample_groups, others)]

    def sample_groups(self, requests, *_):
        groups = {}
        for request in requests:
            for offset, prompt in enumerate(request.prompts):
                if prompt.id not in self._lost:
                    groups[request.first + offset] = self.group(prompt, version=1)
        return RankRollouts(groups, (0.0,) * len(groups), 0.0)

    @staticmethod
    def group(prompt: Prompt, version: int) -> Group:
        """Prompts 0, 3, 6 … are solved, 1, 4, … failed, the others mixed."""
        rewards = ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0))[int(prompt.id) % 3]
        rollouts = tuple(Rollout(prompt, (1, 2), (-1.0, -1.0), "stop", "", version) for _ in rewards)
        verdicts = tuple(Verdict("correct" if reward else "wrong", None, "") for reward in rewards)
        return Group(prompt, rollouts, verdicts, rewards)


@pytest.fixture
def open_made_up(load, tmp_path):
    def build(made_up: MadeUp, *, done: int = 0, rows: int = 30, **settings) -> RolloutSchedule:
        config = load("rl", tmp_path / "run", "prompts_per_step=6", "steps=9", "rollout.responses_per_prompt=2")
        made_up.config = config.rollout.model_copy(update=settings)
        prompts = [Prompt(str(number), (1, 2, 3), "") for number in range(rows)]
        plan = StepPlan(config.steps, config.prompts_per_step, config.seed, config.data.shuffle, completed=done)
        return RolloutSchedule(made_up, prompts, made_up, plan)

    return build


FACTOR_4 = DynamicSamplingConfig(max_prompts_factor=4)


def names(found) -> list[str]:
    return [group.prompt.id for group in found.groups]


def test_dynamic_sampling_fills_the_step_with_groups_that_inform(open_made_up, tmp_path):
    made_up = MadeUp(tmp_path)
    found = open_made_up(made_up, dynamic_sampling=FACTOR_4).next(0)
    assert len(found.groups) == 6 and all(int(name) % 3 == 2 for name in names(found))
    asked = [name for portion in made_up.asked for name in portion]
    assert len(set(asked)) == len(asked) == found.metrics["prompts_sampled"] <= 24, "within an epoch none comes twice"
    assert len(made_up.asked[0]) == 6 and len(made_up.asked) > 1
    assert found.metrics["groups_dropped"] == len(asked) - 6
    judged = [1.0 if int(name) % 3 == 0 else 0.5 * (int(name) % 3 == 2) for name in asked]
    assert found.metrics["reward"] == pytest.approx(np.mean(judged)), "of all that was drawn, not of what was kept"


def test_the_budget_ends_it_and_the_step_takes_what_there_is(open_made_up, tmp_path):
    made_up = MadeUp(tmp_path)
    found = open_made_up(made_up, dynamic_sampling=DynamicSamplingConfig(max_prompts_factor=1.5)).next(0)
    assert found.metrics["prompts_sampled"] == 9
    assert names(found) == [name for portion in made_up.asked for name in portion if int(name) % 3 == 2]


def test_the_objective_says_what_informs(open_made_up, tmp_path):
    """Under VOLD a group that failed altogether still has the teacher's gradient."""
    made_up = MadeUp(tmp_path)
    made_up.objective = build_objective(ObjectiveConfig(preset="vold", beta=0.1), 40)
    found = open_made_up(made_up, dynamic_sampling=FACTOR_4).next(0)
    assert len(found.groups) == 6 and {int(name) % 3 for name in names(found)} == {1, 2}


def test_mixed_groups_alone_are_kept_as_dapo_has_it(open_made_up, tmp_path):
    """Where an overlong penalty or a teacher gives every group a gradient."""
    made_up = MadeUp(tmp_path)
    made_up.objective = build_objective(ObjectiveConfig(preset="vold-unmasked", beta=0.1), 40)
    mixed = FACTOR_4.model_copy(update={"keep": "mixed"})
    assert {int(name) % 3 for name in names(open_made_up(made_up, dynamic_sampling=FACTOR_4).next(0))} == {0, 1, 2}
    found = open_made_up(MadeUp(tmp_path), dynamic_sampling=mixed).next(0)
    assert len(found.groups) == 6 and {int(name) % 3 for name in names(found)} == {2}


@pytest.mark.parametrize("lag", [0, 1])
def test_all_ranks_decide_alike_and_a_resumed_run_goes_on_where_it_was(open_made_up, tmp_path, lag):
    settings = dict(dynamic_sampling=FACTOR_4, curriculum=CurriculumConfig(highest=0.9), lag=lag)
    steps = {}
    for ranks in (1, 3):
        (tmp_path / "prompts.jsonl").unlink(missing_ok=True)
        with open_made_up(MadeUp(tmp_path, ranks, lost=("2", "5")), **settings) as rollouts:
            steps[ranks] = [rollouts.next(step) for step in range(6)]
    assert [found.groups for found in steps[1]] == [found.groups for found in steps[3]]
    assert steps[1][0].metrics["groups_lost"] + steps[1][1].metrics["groups_lost"] > 0
    rows = [row for row in read_rows(tmp_path / "prompts.jsonl") if row["step"] <= 3]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_made_up(MadeUp(tmp_path, lost=("2", "5")), done=3, **settings) as resumed:
        assert [resumed.next(step).groups for step in (3, 4, 5)] == [found.groups for found in steps[1][3:]]
    before = {rewards for found in steps[1][3:] for group in found.groups for rewards in group.earlier}
    assert before == {(1.0, 0.0)}, "the rewards of earlier epochs, of prompts with a gradient"


def test_an_error_in_the_thread_reaches_the_run(load, tmp_path, layout, sampler_that):
    def breaks(found):
        if len(found[0]) > 1 and next(calls) == 1:
            raise ValueError("no engine answers")
        return found

    calls = iter(range(9))
    sampler_that(breaks)
    with pytest.raises(ValueError, match="no engine answers"):
        train_rl(load("rl", tmp_path / "run", *SHORT, "rollout.lag=1"))


def test_a_group_is_never_half(load, tmp_path, layout, sampler_that):
    sampler_that(lambda found: found if len(found[0]) == 1 else [found[0][:-1]])
    with pytest.raises(AssertionError, match="complete or does not come"):
        train_rl(load("rl", tmp_path / "run", *SHORT))
