"""tensorboard, wandb, trackio behind one key: offline, and never at the cost of the run."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from vold.config.schema import EvalConfig
from vold.run import loggers
from vold.run.run_dir import RunLog, read_rows

ROWS = [{"reward": 0.25, "nll": float("nan"), "note": None}, {"reward": 0.5}, {"reward": 0.75}]


def config(tmp_path, *names, **more):
    return EvalConfig(run_dir=tmp_path / "run", checkpoint="c", evaluation={}, loggers=names, **more)


def write(config, rows=ROWS, first=1, resume=False):
    log = RunLog(config, "eval", writer=True, total=len(rows))
    log.open(resume=resume)
    for step, row in enumerate(rows, start=first):
        log.log_step(step, row)
    log.close()
    return read_rows(config.run_dir / "metrics.jsonl")


class Fake:
    """What wandb and trackio have in common."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at, self.settings = [], fails_at, None

    def init(self, **settings):
        if self.fails_at == "init":
            raise ConnectionError("no route\nto host")
        self.settings = settings
        return self

    def log(self, metrics, step):
        if step == self.fails_at:
            raise OSError("disk full")
        self.seen.append((step, metrics))

    def finish(self):
        if self.fails_at == "finish":
            raise RuntimeError("no")
        self.seen.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_step_arrives_with_finite_numbers_only(tmp_path, monkeypatch, capsys, name):
    fake = Fake()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=fake.init, log=fake.log, finish=fake.finish))
    write(config(tmp_path, name))
    assert [(step, metrics["reward"]) for step, metrics in fake.seen[:-1]] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert fake.seen[-1] == "finish" and all(
        not {"nll", "note", "step"} & metrics.keys() for _, metrics in fake.seen[:-1]
    )
    assert fake.settings["config"]["verb"] == "eval" and fake.settings["name"] == "run"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("fails_at", "seen"), [("init", 0), (1, 0), (2, 1), ("finish", 3)])
def test_a_logger_that_fails_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, fails_at, seen):
    broken, whole = Fake(fails_at), Fake()
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", whole)
    rows = write(config(tmp_path, "wandb", "trackio"))
    assert [row["reward"] for row in rows] == [0.25, 0.5, 0.75]
    assert len(broken.seen) == seen and len(whole.seen) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vold: logger wandb is left out (")


def test_a_logger_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert len(write(config(tmp_path, "wandb"))) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install wandb" in line


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_is_offline_unless_told_otherwise(tmp_path, monkeypatch, environment, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(config(tmp_path, "wandb"))
    assert fake.settings["mode"] == mode


def test_a_resumed_run_goes_on_in_the_same_curve_and_a_new_one_does_not(tmp_path, monkeypatch):
    def settings_of(name, run, **how):
        fake = Fake()
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=fake.init, log=fake.log, finish=fake.finish))
        write(config(tmp_path / f"{name}-{run}", name), **how)
        return fake.settings

    runs = (("a", {}), ("a", {"first": 4, "resume": True}), ("b", {}))
    first, resumed, other = (settings_of("wandb", run, **how) for run, how in runs)
    assert first["id"] == resumed["id"] != other["id"] and resumed["resume"] == "allow"
    assert [settings_of("trackio", run, **how)["resume"] for run, how in runs] == ["never", "allow", "never"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_writes_an_offline_run(tmp_path, capsys):
    write(config(tmp_path, "wandb"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert "left out" not in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_the_real_trackio_writes_a_database(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write(config(tmp_path, "trackio"))
    assert (tmp_path / "trackio" / "vold.db").exists()
    assert "left out" not in capsys.readouterr().err


def test_other_ranks_and_runs_without_loggers_open_none(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "SINKS", {})  # any use of it is a KeyError, printed
    write(config(tmp_path))
    quiet = RunLog(config(tmp_path, "wandb"), "eval", writer=False, total=1)
    quiet.log_step(1, {"reward": 1.0})
    quiet.close()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_replaces_steps_it_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(config(tmp_path, "tensorboard"))
    write(config(tmp_path, "tensorboard"), [{"reward": 7.0}], first=3, resume=True)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward")] == [(1, 0.25), (2, 0.5), (3, 7.0)]
