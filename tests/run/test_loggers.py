"""tensorboard, wandb, trackio behind one key: offline, and never at the cost of the run."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
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
    assert fake.settings["config"]["verb"] == "eval" and fake.settings["name"].startswith("run")
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


def test_the_run_is_called_what_the_config_says(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = {"project": "p", "name": "n", "group": "g", "entity": "e", "tags": "a,b"}
    write(config(tmp_path, "wandb", tracking=names))
    assert {key: fake.settings[key] for key in names} == names | {"tags": ("a", "b")}


def test_a_resumed_run_goes_on_in_the_same_curve_and_a_new_one_does_not(tmp_path, monkeypatch):
    def settings_of(run, **how):
        monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
        write(config(tmp_path / run, "wandb"), **how)
        return fake.settings

    first, resumed, other = settings_of("a"), settings_of("a", first=4, resume=True), settings_of("b")
    assert first["id"] == resumed["id"] != other["id"] and resumed["resume"] == "allow"


def lose_last_step_and_resume(config):
    """Three steps, of which the last is lost with its checkpoint and made again, otherwise."""
    rows = write(config)
    (config.run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    write(config, [{"reward": 7.0}], first=3, resume=True)


def wandb_records(content):
    """Of a .wandb file (LevelDB's log format: blocks of 32 KiB; a record's fragments have type 1, or 2, 3 ..., 4)."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


REWARDS = [(1, 0.25), (2, 0.5), (3, 7.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_has_each_step_of_a_resumed_run_once(tmp_path, capsys):
    from wandb.proto.wandb_internal_pb2 import Record

    lose_last_step_and_resume(config(tmp_path, "wandb"))
    assert "left out" not in capsys.readouterr().err
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    seen = []
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if items:
            seen.append((int(items["_step"]), float(items["reward"])))
    assert seen == REWARDS


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_wandb_run_that_is_on_a_server_is_not_removed(tmp_path):
    where = config(tmp_path, "wandb")
    write(where)
    (path,) = where.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    Path(f"{path}.synced").touch()
    write(where, [{"reward": 7.0}], first=3, resume=True)
    assert path.exists() and len(list(where.run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == 2


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_the_real_trackio_has_each_step_once_and_keeps_runs_of_one_name_apart(tmp_path, capsys):
    script = tmp_path / "read.py"
    script.write_text(TRACKIO)
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    curves = json.loads(done.stdout.splitlines()[-1])
    assert sorted(curves) == sorted([[[1, 0.25], [2, 0.5], [3, 0.75]], [list(point) for point in REWARDS]])


TRACKIO = """
import json, sys
from pathlib import Path
import trackio
from run.test_loggers import config, lose_last_step_and_resume, write

write(config(Path(sys.argv[1]) / "a", "trackio"))
lose_last_step_and_resume(config(Path(sys.argv[1]) / "b", "trackio"))
from trackio.sqlite_storage import SQLiteStorage
runs = [(run.name, run.id) for run in trackio.Api().runs("vold")]
logs = [SQLiteStorage.get_logs("vold", name, run_id=run_id) for name, run_id in runs]
print(json.dumps([[[row["step"], row["reward"]] for row in log] for log in logs]))
"""
"""In a process of its own: trackio reads its directory when it is imported."""


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
