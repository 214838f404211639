"""Real processes to train in, kill and hang: forked from a server that has imported everything, so they start at once.

`torchrun` starts each rank from nothing, some six seconds of imports; a fault matrix needs dozens of ranks.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = ["torch", "ranks", "steps", "vold.cli", "vold.stages.sft", "vold.stages.rl", "vold.trainer.checkpoint"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


@dataclass
class Ranks:
    """A world of processes and what each printed."""

    processes: list[BaseProcess]
    logs: list[Path]

    def join(self, timeout: float = 120.0) -> list[int]:
        """Exit codes; a rank that is still there after `timeout` seconds is killed and fails the test."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # where it stands, into its log
        time.sleep(1 if late else 0)
        for process in self.processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} did not end within {timeout} s:\n{self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self, rank: int | None = None) -> str:
        return "\n".join(log.read_text() for log in self.logs[slice(rank, None if rank is None else rank + 1)])


def start(world: int, body: Callable, *arguments, logs: Path) -> Ranks:
    """Run body(*arguments) on `world` ranks; output goes to files below `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [logs / f"rank{rank}.log" for rank in range(world)]
    processes = [
        _FORKS.Process(target=_enter, args=(rank, world, port, file, body, arguments), daemon=True)
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, files)


def run(world: int, body: Callable, *arguments, logs: Path, timeout: float = 120.0) -> Ranks:
    """`start`, and every rank must end well."""
    ranks = start(world, body, *arguments, logs=logs)
    codes = ranks.join(timeout)
    assert codes == [0] * world, f"exit codes {codes}\n{ranks.said()}"
    return ranks


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
        OMP_NUM_THREADS="1",
    )
    body(*arguments)
