"""A run directory over its life: older configs, moved folders, logs behind a checkpoint, what killed processes left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vold.config import dump_config, load_config
from vold.config.load import RENAMED_KEYS
from vold.config.schema import RlConfig
from vold.file_errors import file_error_line
from vold.parallel.collectives import run_on_all_ranks
from vold.planning.check import _check_run_dir
from vold.processes import Process
from vold.run import leftovers, lock
from vold.run.resumption import check_run_dir
from vold.run.run_dir import RunLog, read_rows

RELEASED = Path(__file__).with_name("config-0.1.0.yaml")  # as vold 0.1.0 wrote it
MINIATURE = Path(__file__).parents[2] / "vold" / "miniature" / "configs" / "rl.yaml"


@pytest.fixture
def present(tmp_path):
    """present(run_dir, *overrides) -> the config of that run, as the present command line builds it."""

    def build(run_dir: Path, *overrides: str) -> RlConfig:
        old = yaml.safe_load(RELEASED.read_text())
        kept = (
            "student",
            "teacher",
            "data",
            "steps",
            "prompts_per_step",
            "save_every",
            "keep_checkpoints",
            "evaluation",
        )
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({name: old[name] for name in kept}))
        same = ["rollout.responses_per_prompt=3", "rollout.max_new_tokens=12", "optimizer.warmup_steps=1"]
        same += ["objective.target_kl=0.01", f"run_dir={run_dir}"]
        return load_config(RlConfig, MINIATURE, [str(tmp_path / "own.yaml"), *same, *overrides])

    return build


def run_of(run_dir: Path, text: str) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(text)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    return run_dir


# -- which run a directory holds -----------------------------------------------------------------------------------


def _nothing(run_dir: Path, config: RlConfig) -> None:
    """No directory at all."""


def _attempt(run_dir: Path, config: RlConfig) -> None:
    """Stopped before its first step, with another learning rate."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(config, "rl").replace("lr: 0.0003", "lr: 0.01"))


def _same_run(run_dir: Path, config: RlConfig) -> None:
    run_of(run_dir, dump_config(config, "rl"))


def _other_run(run_dir: Path, config: RlConfig) -> None:
    run_of(run_dir, dump_config(config, "rl").replace("lr: 0.0003", "lr: 0.01"))


def _other_stage(run_dir: Path, config: RlConfig) -> None:
    run_of(run_dir, dump_config(config, "sft"))


def _rows_alone(run_dir: Path, config: RlConfig) -> None:
    """metrics.jsonl without config.yaml."""
    run_of(run_dir, "")
    (run_dir / "config.yaml").unlink()


def _file(run_dir: Path, config: RlConfig) -> None:
    run_dir.write_text("")


def _config_is_a_folder(run_dir: Path, config: RlConfig) -> None:
    (run_dir / "config.yaml").mkdir(parents=True)


@pytest.mark.parametrize(
    "make", [_nothing, _attempt, _same_run, _other_run, _other_stage, _rows_alone, _file, _config_is_a_folder]
)
def test_check_and_the_run_agree_on_every_run_dir(present, tmp_path, make):
    """`vold check` says ✓ exactly where the run starts, or goes on with --resume."""
    config = present(tmp_path / "run", "optimizer.lr=3e-4")
    make(config.run_dir, config)

    def accepts(check, *arguments) -> bool:
        try:
            check(config, *arguments)
        except ValueError as error:
            assert "\n" not in str(error)
            return False
        return True

    starts, resumes = (accepts(check_run_dir, "rl", resume) for resume in (False, True))
    assert accepts(_check_run_dir) is (starts or resumes)
    if starts or resumes:
        assert ("--resume" in _check_run_dir(config)) is not starts


# -- older configs -------------------------------------------------------------------------------------------------


def test_a_run_of_the_last_release_resumes(present, tmp_path):
    text = RELEASED.read_text()
    assert all(f"{old.rpartition('.')[2]}:" in text for old in RENAMED_KEYS if old.split(".")[0] in text)
    run_dir = run_of(tmp_path / "run", text)
    check_run_dir(present(run_dir), "rl", resume=True)
    check_run_dir(present(run_dir, "keep_checkpoints=1", "stop_grace_seconds=5"), "rl", resume=True)
    for changed, said in {
        "optimizer.lr=1e-3": "optimizer.lr was 0.0003 and is now 0.001",
        "objective.clip_eps_low=0.1": "objective.clip_eps_low was None and is now 0.1",
    }.items():
        with pytest.raises(ValueError, match=said):
            check_run_dir(present(run_dir, changed), "rl", resume=True)


def test_values_under_their_old_names_are_compared_and_unknown_keys_refused(present, tmp_path):
    text = (
        RELEASED.read_text().replace("clip_low: null", "clip_low: 0.1").replace("divergence: null", "divergence: full")
    )
    run_dir = run_of(tmp_path / "run", text)
    check_run_dir(present(run_dir, "objective.clip_eps_low=0.1", "objective.divergence=reverse_kl"), "rl", resume=True)
    (run_dir / "config.yaml").write_text(RELEASED.read_text() + "of_tomorrow: 3\n")
    with pytest.raises(ValueError, match="of_tomorrow was 3 and is now None"):
        check_run_dir(present(run_dir), "rl", resume=True)


def test_a_moved_run_resumes_where_it_is(present, tmp_path):
    """Also with models and data that moved along, and from its own config.yaml, which names the place before."""
    there = present(tmp_path / "old" / "runs" / "a", f"student={tmp_path}/old/student", "data.path=/data/train.json")
    run_dir = run_of(tmp_path / "new" / "runs" / "a", dump_config(there, "rl"))
    for student in ("old", "new"):
        moved = present(run_dir, f"student={tmp_path}/{student}/student", "data.path=/data/train.json")
        check_run_dir(moved, "rl", resume=True)
    with pytest.raises(ValueError, match="student was"):
        check_run_dir(present(run_dir, "student=/other/student", "data.path=/data/train.json"), "rl", resume=True)
    assert load_config(RlConfig, run_dir / "config.yaml").run_dir == run_dir
    assert load_config(RlConfig, run_dir / "config.yaml", ["run_dir=runs/b"]).run_dir == Path("runs/b")


# -- logs ----------------------------------------------------------------------------------------------------------


def test_logs_that_a_crash_or_a_hand_changed_are_named_and_the_timeline_stays(present, tmp_path, capfd):
    config = present(tmp_path / "run")

    def open_log(resume: bool) -> RunLog:
        log = RunLog(config, "rl", writer=True, total=9)
        log.open(resume=resume)
        return log

    log = open_log(False)
    for step in range(1, 7):
        with log.phase("train"):
            pass
        log.log_prompts(step, [{"prompt_id": "a", "pass_rate": 0.5}])
        log.log_step(step, {"reward": 0.5}, [{"text": "a"}])
        log.flush()
        if step == 4:
            described = log.flush()
    log.close()
    log = open_log(True)
    log.check_rows(4, described)
    assert capfd.readouterr().err == "", "rows beyond the checkpoint are nothing to name"
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes().splitlines(keepends=True)
    for lines, said in {
        (0, 3, 4, 5): "steps 2-3 are missing",
        (0, 2, 3): "step 2 is missing",
        (): "steps 1-4 are missing",
    }.items():
        metrics.write_bytes(b"".join(whole[line] for line in lines))
        log.check_rows(4, described)
        assert f"vold: {metrics}: {said} since the checkpoint of step 4" in capfd.readouterr().err
    metrics.write_bytes(b"".join(whole).replace(b'"reward": 0.5', b'"reward": 0.7', 1))
    log.check_rows(4, described)
    assert "rows were changed since" in capfd.readouterr().err
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes().replace(b'"text": "a"', b'"text": "b"', 1))
    log.check_rows(4, described)
    assert f"vold: {samples}: rows were changed since" in capfd.readouterr().err
    log.drop_rows_after(4)
    log.log_step(5, {"reward": 0.5})
    assert [row["step"] for row in read_rows(tmp_path / "run" / "timeline.jsonl")] == [1, 2, 3, 4, 5]
    log.close()


# -- errors of the file system -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EBUSY, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_file_error_is_one_line_with_its_cause(layout, number):
    def fails() -> None:
        raise OSError(number, os.strerror(number), "/runs/a")

    with pytest.raises(ValueError) as error:
        run_on_all_ranks(fails)
    line = str(error.value)
    assert line.startswith(f"/runs/a: {os.strerror(number)}; ") and len(line.splitlines()) == 1
    assert ("make room" in line) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_missing_file_may_be_a_bug_and_safetensors_errors_are_read():
    assert file_error_line(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None
    assert file_error_line(ValueError("os error")) is None
    line = file_error_line(Exception("I/O error: Stale file handle (os error 116)"))
    assert line is not None and "Stale file handle; the file server" in line


# -- locks and leftovers ---------------------------------------------------------------------------------------------


def dead_process() -> Process:
    code = "import json; from vold.processes import Process; print(json.dumps(Process.current().fields()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    process = Process.from_fields(json.loads(run.stdout))
    assert process is not None
    return process


def test_a_lock_of_another_machine_is_judged_by_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.5)
    path, far = (
        tmp_path / "lock.json",
        {**Process.current().fields(), "machine": "another", "host": "far", "verb": "rl"},
    )
    path.write_text(json.dumps({**far, "heartbeat": 1}))
    taken = lock.RunLock(tmp_path, "rl")  # no heartbeat comes: it is dead
    assert json.loads(path.read_text())["host"] != "far"
    path.write_text(json.dumps({**far, "heartbeat": 2}))
    with pytest.raises(ValueError, match=r"was taken over by vold rl, process \d+ on far"):
        taken.check()
    beats = iter(range(3, 99))
    monkeypatch.setattr(lock.time, "sleep", lambda _: path.write_text(json.dumps({**far, "heartbeat": next(beats)})))
    with pytest.raises(ValueError, match=rf"run_dir = {tmp_path} is in use by vold rl, process \d+ on far"):
        lock.RunLock(tmp_path, "rl")


def test_garbage_in_a_lock_and_one_that_was_copied_are_no_holders(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    (tmp_path / "lock.json").write_bytes(b"\xff{")
    lock.RunLock(tmp_path, "rl").release()
    assert not (tmp_path / "lock.json").exists()


def test_what_dead_processes_left_is_removed_and_the_living_stay(tmp_path, present):
    shm, dead = tmp_path / "shm", dead_process()
    assert not dead.is_alive and Process.current().is_alive
    owners = {"dead": dead, "living": Process.current(), "far": Process("far", "elsewhere", 1, 1.0), "unknown": None}
    for name, owner in owners.items():
        folder = shm / f"vold-weights-{name}"
        folder.mkdir(parents=True)
        if owner:
            (folder / "owner.json").write_text(json.dumps(owner.fields()))
    assert [path.name for path in leftovers.dead_weights(shm)] == ["vold-weights-dead"]
    assert [path.name for path in leftovers.unknown_weights(shm)] == ["vold-weights-far", "vold-weights-unknown"]
    leftovers.remove(leftovers.dead_weights(shm))
    assert len(list(shm.iterdir())) == 3

    run_dir = tmp_path / "run"
    (run_dir / f".model.{dead.pid}.partial").mkdir(parents=True)
    (run_dir / f".model.{os.getpid()}.partial").mkdir()
    (run_dir / "checkpoints" / ".partial-step-000002").mkdir(parents=True)
    (run_dir / "checkpoints" / f".latest.{dead.pid}.partial").touch()
    log = RunLog(present(run_dir), "rl", writer=True, total=1)
    log.open(resume=False)
    left = {path.name for path in run_dir.rglob("*")}
    assert left == {f".model.{os.getpid()}.partial", "checkpoints", "config.yaml", "lock.json", "log.txt"}
    log.close()
