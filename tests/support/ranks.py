"""Rank processes for tests, forked from a server that has imported everything, so that they start at once.

`torchrun` would import everything in each rank, some six seconds; a fault matrix needs dozens of ranks.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
PRELOADED = [
    "torch",
    "support.steps",
    "support.tiny",
    "vold.cli",
    "vold.train.sft",
    "vold.train.rl",
    "vold.train.teacher_traces",
    "vold.trainer.checkpoint",
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


@dataclass
class Ranks:
    """A world of processes and the files with their output."""

    processes: list[BaseProcess]
    logs: list[Path]
    store: TCPStore

    def join(self, timeout: float = 240.0, hung: Sequence[int] = ()) -> list[int]:
        """Exit codes, once all but the `hung` have ended; those are killed. A rank that still runs after `timeout`
        seconds writes its stack trace to its log, is killed, and fails the test."""
        deadline = time.monotonic() + timeout
        waited = [process for rank, process in enumerate(self.processes) if rank not in hung]
        for process in waited:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in waited if process.is_alive()]
        for process in late:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1 if late else 0)
        for process in self.processes:
            process.kill()
            process.join()
        assert not late, f"{len(late)} ranks did not end within {timeout} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int | None = None) -> str:
        return "\n".join(log.read_text() for log in self.logs[slice(rank, None if rank is None else rank + 1)])


def start(world: int, body: Callable, *arguments, logs: Path) -> Ranks:
    """Run body(*arguments) on `world` ranks; output goes to files below `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    # As torchrun's agent does: the rendezvous store outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [logs / f"rank{rank}.log" for rank in range(world)]
    processes = [
        _FORKS.Process(target=_enter, args=(rank, world, store.port, file, body, arguments))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, files, store)


def run(world: int, body: Callable, *arguments, logs: Path, timeout: float = 240.0) -> Ranks:
    """`start`, wait for all ranks, and require that every one exits with 0."""
    ranks = start(world, body, *arguments, logs=logs)
    codes = ranks.join(timeout)
    assert codes == [0] * world, f"exit codes {codes}\n{ranks.output()}"
    return ranks


def run_program(world: int, *arguments: str, logs: Path) -> subprocess.CompletedProcess:
    """A script or `-m module` on `world` ranks, with this process's environment and directory; output captured."""
    setting = (dict(os.environ), os.getcwd(), [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    words = [str(word) for word in arguments]
    ranks = start(world, _run_program, words, *setting, logs, logs=logs)
    codes = ranks.join(timeout=600.0)
    errors = "".join(path.read_text() for path in sorted(logs.glob("*.err")))
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), ranks.output(), errors)


def _run_program(words: list[str], environment: dict, directory: str, paths: list[str], logs: Path) -> None:
    rank, facts = os.environ["RANK"], {name: os.environ[name] for name in RANK_VARIABLES}
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if name not in RANK_VARIABLES})
    os.environ.update(facts if facts["WORLD_SIZE"] != "1" else {}, OMP_NUM_THREADS="1")
    os.chdir(directory)
    sys.path[:0] = paths
    os.dup2(os.open(logs / f"rank{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = words[words[0] == "-m" :]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _enter(rank: int, world: int, port: int, log: Path, body: Callable, arguments: tuple) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.register(signal.SIGUSR1, file=handle, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    body(*arguments)
