"""Runs that are asked to stop, that meet another writer, that lose their launcher or a rank before the first step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from support import ranks, sabotage
from vold.run.run_dir import read_rows

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


@pytest.fixture
def vold(arguments, tmp_path):
    """vold(faults, *overrides, world) -> running ranks of an eight-step run in tmp_path/run."""
    launches = count()

    def launch(faults: dict, *extra: str, world: int = 1) -> ranks.Ranks:
        given = [*arguments, "steps=8", "save_every=0", f"run_dir={tmp_path / 'run'}", *extra]
        return ranks.start(world, sabotage.run_verb, given, faults, logs=tmp_path / f"launch{next(launches)}")

    return launch


def saved(run_dir: Path) -> int | None:
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text()[5:]) if latest.exists() else None


def rows(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def test_repeats_are_ignored_until_the_step_is_saved(vold, tmp_path):
    """A launcher and a scheduler each send SIGTERM; one comes while the file is being written."""
    world = vold({0: (sabotage.gets_signals_until_saved, 2), 1: (sabotage.gets_signals, 2, (0, TERM))}, world=2)
    assert world.join() == [143, 143], world.output()
    assert saved(tmp_path / "run") == 2 and rows(tmp_path / "run") == [1, 2]
    assert "vold: SIGTERM: the step under way is finished and saved first" in world.output(0)


def test_hangup_and_ctrl_c_save_and_a_second_ctrl_c_or_a_late_sigterm_ends_at_once(vold, tmp_path):
    run_dir = tmp_path / "run"
    for number, (signals, extra, code, latest) in enumerate(
        [
            ([(0, HUP)], [], 129, 1),
            ([(0, INT), (0, INT)], ["--resume"], 130, 2),  # a launcher passes it on: one Ctrl-C
            ([(0, INT), (1.3, INT), (0.3, INT)], ["--resume"], 130, 2),
            ([(0, TERM), (1.3, TERM)], ["--resume", "stop_grace_seconds=1"], 143, 2),
            ([(0, TERM), (1.3, TERM)], ["--resume"], 143, 3),  # within the grace
        ]
    ):
        world = vold({0: (sabotage.gets_signals, 1, *signals)}, *extra)
        assert (world.join(), saved(run_dir)) == ([code], latest), (number, world.output())
    assert rows(run_dir) == [1, 2, 3]


def test_a_second_writer_is_refused_and_a_dead_one_is_followed(vold, tmp_path):
    run_dir = tmp_path / "run"
    first = vold({0: (sabotage.hangs_in_step, 4)}, "save_every=2")
    wait_for(lambda: saved(run_dir) == 2 and rows(run_dir) == [1, 2, 3])
    second = vold({}, "--resume", "save_every=2")
    assert second.join() == [2]
    line = f"vold: run_dir = {run_dir} is in use by vold sft, process {first.processes[0].pid} on "
    assert second.output().startswith(line) and len(second.output().splitlines()) == 1, second.output()
    assert rows(run_dir) == [1, 2, 3] and first.processes[0].is_alive(), "nothing was dropped under the living run"
    os.kill(first.processes[0].pid, signal.SIGKILL)
    third = vold({}, "--resume", "save_every=2")
    assert third.join() == [0], third.output()
    assert rows(run_dir) == list(range(1, 9)) and not (run_dir / "lock.json").exists()


def test_a_rank_that_dies_before_the_start_is_named(vold):
    world = vold({1: (sabotage.dies_before_it_starts,)}, "timeout_seconds=4", world=3)
    assert world.join(timeout=60) == [1, -9, 1], world.output()
    assert world.output().count("rank 1 did not start within timeout_seconds = 4") == 2, world.output()


def test_ranks_end_saved_when_only_their_launcher_is_killed(arguments, tmp_path):
    run_dir, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "vold"]
    given = [*arguments, "steps=100000", "save_every=0", f"run_dir={run_dir}"]
    with (tmp_path / "output").open("wb") as output:
        torchrun = subprocess.Popen([sys.executable, *launcher, *given], env=environment, stdout=output, stderr=output)
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 1, 120)
        holder = json.loads((run_dir / "lock.json").read_text())["pid"]
        torchrun.kill()
        torchrun.wait()
    wait_for(lambda: not Path(f"/proc/{holder}").exists())
    assert saved(run_dir) == rows(run_dir)[-1], (tmp_path / "output").read_text()
    assert f"the launcher (torchrun, process {torchrun.pid}) is gone" in (tmp_path / "output").read_text()
