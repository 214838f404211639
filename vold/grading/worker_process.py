"""The parent's end of a worker process: a question goes in, JSON lines come out, and its CPU time is watched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vold.grading.worker import START_SECONDS

EXIT_SECONDS = 30.0  # from a worker's closed pipe to its end: it may have much memory to return
LATE = 1.0  # seconds behind its own deadline at which this process did not run either


@dataclass
class Job:
    """A question to a worker and what came of it.

    question  what the caller knows it by
    message   what the worker reads, a JSON object
    outcome   "" while open
    rule      what decided it
    reply     the worker's, where it was kept
    """

    question: Any = None
    message: Mapping[str, Any] = field(default_factory=dict)
    deaths: int = 0
    started: float = 0.0
    seconds: float = 0.0
    outcome: str = ""
    rule: str = ""
    reply: Mapping[str, Any] | None = None

    def close(self, outcome: str, rule: str) -> None:
        """Set what came of it, and how long it took."""
        self.outcome, self.rule = outcome, rule
        self.seconds = time.monotonic() - self.started


@dataclass(frozen=True)
class WorkerCommand:
    """How a worker process is started.

    module     run with `python -m`; it reads and writes JSON lines
    arguments  of its command line
    window     seconds of waiting for a reply after which its CPU time is looked at
    env        laid over this process's environment
    stderr     file that gets what it prints; nowhere when None
    """

    module: str
    arguments: tuple[str, ...]
    window: float
    env: Mapping[str, str] = field(default_factory=dict)
    stderr: Path | None = None


class Worker:
    """The parent's end of one worker process. Starting one takes about a second; it reports when it is ready."""

    def __init__(self, command: WorkerCommand) -> None:
        self.ready, self.job, self.buffer, self.outgoing = False, None, b"", b""
        self.idle_windows = 0  # one after the other without CPU time
        self._window = START_SECONDS
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(command.stderr.open("ab")) if command.stderr else subprocess.DEVNULL
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", command.module, *command.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": path, **command.env},
                bufsize=0,
                start_new_session=True,  # so that `kill` reaches what it started itself
            )
        os.set_blocking(self.process.stdin.fileno(), False)
        self._process_info = psutil.Process(self.process.pid)
        self._command = command
        self._begin_window()

    def send(self, job: Job) -> None:
        """Begin to send a question; `flush` sends what does not fit into the pipe. Raises OSError if the worker is
        gone."""
        self.outgoing = json.dumps(job.message).encode() + b"\n"
        self.flush()
        self.job, job.started = job, time.monotonic()
        self._window = self._command.window
        self.idle_windows = 0
        self._begin_window()

    def flush(self) -> None:
        """Send more of `outgoing`, as much as the pipe takes. Raises OSError if the worker is gone."""
        with contextlib.suppress(BlockingIOError):
            while self.outgoing:
                self.outgoing = self.outgoing[os.write(self.process.stdin.fileno(), self.outgoing) :]

    def receive(self) -> list[dict] | None:
        """Messages that have arrived, None once the worker has died."""
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def end_window(self, now: float) -> None:
        """Count the window that ends now: idle unless the worker got CPU time in it, or this process itself did not
        run (a suspended machine), and begin the next."""
        moved = self.cpu_seconds() > self._cpu_at_start or now - self.deadline > LATE
        self.idle_windows = 0 if moved else self.idle_windows + 1
        self._begin_window()

    def _begin_window(self) -> None:
        self.deadline = time.monotonic() + self._window
        self._cpu_at_start = self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """CPU time that the process has had, in steps of about 10 ms; 0 once it is gone."""
        with contextlib.suppress(psutil.Error):
            return sum(self._process_info.cpu_times()[:2])
        return 0.0

    def sleeps(self) -> bool:
        """Whether it waits for something other than a CPU or a disk, of its own accord."""
        with contextlib.suppress(psutil.Error):
            return self._process_info.status() == psutil.STATUS_SLEEPING
        return False

    def exit_code(self) -> int | None:
        """Exit code of a worker whose pipe has closed; None while it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(EXIT_SECONDS)
        return None

    def kill(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
