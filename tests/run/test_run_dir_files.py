"""What else may lie where a run directory has a file: a pipe, a folder, a link, a device, nothing, too much."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from vold.config import dump_config
from vold.config.schema import RlConfig
from vold.run import lock
from vold.run.lock import RunLock, living_holder
from vold.run.resumption import check_run_dir
from vold.run.run_dir import read_rows
from vold.trainer.checkpoint import Checkpoints, verify


def put(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "giant":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind != "empty":
        path.symlink_to({"device": "/dev/zero", "circle": path.name, "link": path.parent / "theirs"}[kind])
    else:
        path.touch()


def config_of(run_dir: Path) -> RlConfig:
    data, rollout, optimizer = {"path": "d", "layout": "orz"}, {"max_new_tokens": 8}, {"lr": 1e-5}
    return RlConfig(run_dir=run_dir, student="s", data=data, steps=1, rollout=rollout, optimizer=optimizer)


ALL = ["pipe", "folder", "device", "circle", "empty", "giant"]
READERS = {
    "config.yaml": lambda run: check_run_dir(config_of(run), "rl", resume=True),
    "metrics.jsonl": lambda run: read_rows(run / "metrics.jsonl"),
    "checkpoints/latest": lambda run: Checkpoints(run, None).latest_step(),
    "checkpoints/step-000001/manifest.json": lambda run: verify(run / "checkpoints" / "step-000001"),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", READERS)
def test_a_strange_file_is_refused_by_name(name, kind, tmp_path):
    put(tmp_path / name, kind)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    try:
        found = READERS[name](tmp_path)
        assert found in ([], None) and kind in ("empty", "giant", "circle", "device"), found
    except OSError as error:  # the command line says what the system says of it
        assert kind in ("circle", "folder") and str(tmp_path / name) == str(error.filename)
    except ValueError as error:
        assert str(tmp_path / name) in str(error) and len(str(error).splitlines()) == 1, str(error)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle", "link"])
def test_a_lock_is_a_file_of_its_own(kind, tmp_path):
    put(tmp_path / "lock.json", kind)
    theirs = tmp_path / "theirs"
    theirs.write_text("their words")
    with pytest.raises(ValueError, match=r"lock\.json is no ordinary file; delete it"):
        RunLock(tmp_path, "rl")
    assert living_holder(tmp_path) == "" and theirs.read_text() == "their words"


def test_a_lock_of_any_size_and_one_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "EXCLUSIVE_SECONDS", 0.5)
    put(tmp_path / "lock.json", "giant")
    RunLock(tmp_path, "rl").release()
    (tmp_path / "lock.json").touch()
    with (tmp_path / "lock.json").open() as reader:  # another user's process, which may only read it
        fcntl.flock(reader, fcntl.LOCK_EX)
        RunLock(tmp_path, "rl").release()


def test_a_lock_that_becomes_a_pipe_ends_no_thread_with_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    failed: list = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    held = RunLock(tmp_path, "rl")
    (tmp_path / "lock.json").unlink()
    os.mkfifo(tmp_path / "lock.json")
    threading.Event().wait(0.3)
    held.check()
    held.release()
    assert not failed


@pytest.mark.parametrize("resume", [True, False])
def test_results_without_their_config_are_not_written_over(resume, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"config\.yaml is missing beside metrics\.jsonl; write it back"):
        check_run_dir(config_of(tmp_path), "rl", resume=resume)
    (tmp_path / "config.yaml").write_text(dump_config(config_of(tmp_path), "rl"))
    check_run_dir(config_of(tmp_path), "rl", resume=True)
