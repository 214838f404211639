"""A pool of worker processes that answer one question at a time; a worker whose question hangs is killed and replaced.

`concurrent.futures` cannot do this: `future.result(timeout)` leaves the hung worker in place, so two bad answers
poison a two-worker pool. Workers are plain child processes that exchange JSON lines, which also works under torchrun:
nothing is forked after CUDA starts and the main module is not imported again.

A hang and a busy machine look alike from outside; the worker's own CPU time tells them apart. The kernel ends a worker
that has computed for `seconds` (SIGPROF), however long that took. One that computes slowly is waited for as long as it
gets any CPU time, and one that gets none is starved, which is not its question's doing.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from vold.grading.worker import START_SECONDS
from vold.grading.worker_process import Job, Worker, WorkerCommand
from vold.io import log

START_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before each start after one that failed, seconds
# How a worker ends through its question: out of CPU time, or crashed. (SIGKILL comes from outside: the system or us.)
_TIMEOUT = -signal.SIGPROF
_CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)


class WorkerPool:
    """Workers of one command; use as a context manager. Threads may share it; it answers one call at a time.

    own_fault   outcome of a question that used up its time or crashed its worker twice
    patience    windows without CPU time after which a question is broken ("starved")
    counters    since construction: timeouts, respawns (replacements for any reason), broken
    """

    own_fault = "wrong"
    patience = 1
    what = "grading workers"

    def __init__(self, size: int, command: WorkerCommand) -> None:
        self.size, self._command = size, command
        self._turn = threading.Lock()
        self.counters = {"timeouts": 0, "respawns": 0, "broken": 0}
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts, self._next_start, self._last_death = 0, 0.0, ""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. They also end when this process does."""
        for worker in list(self._workers):
            self._remove(worker)

    def finish_job(self, job: Job, reply: Mapping[str, Any]) -> None:
        """Close a job by its worker's reply."""
        raise NotImplementedError

    def overdue_rule(self, worker: Worker) -> str:
        """Why a job whose window has ended without a reply is given up; "" to go on waiting."""
        return "starved" if worker.idle_windows >= self.patience else ""

    # -- one call --------------------------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[Job]) -> None:
        """Close all jobs. Raises ValueError where no worker can be started."""
        with self._turn:
            self._close_jobs(jobs)

    def _close_jobs(self, jobs: Sequence[Job]) -> None:
        waiting = deque(jobs)
        for worker in [w for w in self._workers if w.job is not None]:  # left by an interrupted call
            self._remove(worker)
        if self._failed_starts >= len(START_DELAYS):
            self._failed_starts = 0
        while unfinished := sum(not job.outcome for job in jobs):
            self._start_missing(min(self.size, unfinished))
            self._dispatch(waiting)
            self._collect(waiting)
            self._expire()

    def _dispatch(self, waiting: deque[Job]) -> None:
        for worker in list(self._workers):
            if waiting and worker.ready and worker.job is None:
                try:
                    worker.send(waiting[0])
                    waiting.popleft()
                except OSError:
                    self._replace(worker)  # died while idle: not this question's fault
                    continue
                if worker.outgoing:
                    self._selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)

    def _collect(self, waiting: deque[Job] | None) -> None:
        pending = [worker.deadline for worker in self._workers if worker.job is not None or not worker.ready]
        now = time.monotonic()
        if self._next_start > now and self._failed_starts < len(START_DELAYS):
            pending.append(self._next_start)
        for key, _ in self._selector.select(max(0.0, min(pending, default=0.0) - now)):
            worker: Worker = key.data
            if worker not in self._workers:  # removed by the event before
                continue
            if key.fileobj is worker.process.stdin:
                self._flush(worker)
                continue
            messages = worker.receive()
            if messages is None:
                self._handle_death(worker, waiting)
            else:
                for message in messages:
                    self._accept(worker, message)

    def _flush(self, worker: Worker) -> None:
        with contextlib.suppress(OSError):  # its death is read from its other pipe
            worker.flush()
            if worker.outgoing:
                return
        self._selector.unregister(worker.process.stdin)

    def _accept(self, worker: Worker, message: dict) -> None:
        if "failed" in message:
            raise ValueError(self.start_error(message["failed"]))
        if "ready" in message:
            worker.ready, self._failed_starts = True, 0
            self.note_ready(message)
            return
        job, worker.job = worker.job, None
        self.finish_job(job, message)
        if message["retire"]:
            self._replace(worker)

    def note_ready(self, message: Mapping[str, Any]) -> None:
        """Read what a worker reports when it is ready."""

    def start_error(self, reason: str) -> str:
        """The message for a worker that reports that it cannot start."""
        return f"{self.what} cannot start: {reason}; is math-verify installed?"

    def _handle_death(self, worker: Worker, waiting: deque[Job] | None) -> None:
        """Replace a dead worker. A question that ran out of CPU time is over; after any other death it is asked once
        more, because something else may have been the cause."""
        job, code = worker.job, worker.exit_code()
        if code == _TIMEOUT and not worker.ready:
            raise ValueError(self.start_error(f"it computed for more than {START_SECONDS:g} s"))
        self._last_death = _cause(code)
        self._replace(worker)
        if job is None:
            return
        job.deaths += 1
        if code == _TIMEOUT:
            self.counters["timeouts"] += 1
            job.close(self.own_fault, "timeout")
        elif job.deaths < 2:
            waiting.appendleft(job)
        elif code in _CRASHES:
            job.close(self.own_fault, "crashed")
        else:
            job.close("broken", "worker_died")

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now < worker.deadline or (worker.ready and worker.job is None):
                continue
            worker.end_window(now)
            if worker.job is None and worker.idle_windows and worker.sleeps():
                raise ValueError(self.start_error(f"it waited for {START_SECONDS:g} s"))
            if worker.job is None:
                rule = "starved" if worker.idle_windows else ""
            elif rule := self.overdue_rule(worker):
                self.counters["timeouts"] += rule == "timeout"
                worker.job.close("broken", rule)
            if rule:
                self._last_death = "they get no CPU time"
                self._replace(worker)

    # -- starting --------------------------------------------------------------------------------------------------

    def _start_missing(self, wanted: int) -> None:
        while len(self._workers) < wanted and time.monotonic() >= self._next_start:
            if self._failed_starts >= len(START_DELAYS):
                break
            self._start()
        if self._failed_starts >= len(START_DELAYS) and not any(worker.ready for worker in self._workers):
            raise ValueError(
                f"{self.what} died {self._failed_starts} times in a row while starting ({self._last_death}); free some "
                "memory or lower grader_workers"
            )

    def _start(self) -> None:
        try:
            worker = Worker(self._command)
        except OSError as error:  # no process, file or memory to be had at this moment
            self._last_death = error.strerror or type(error).__name__
            self._count_failed_start()
            return
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker: Worker) -> None:
        for pipe in (worker.process.stdout, worker.process.stdin):
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
        self._workers.remove(worker)
        worker.kill()

    def _replace(self, worker: Worker) -> None:
        """Remove a worker and start another: at once, or after a while where starting itself fails."""
        self._remove(worker)
        self.counters["respawns"] += 1
        if not worker.ready:
            self._count_failed_start()
        elif not self._failed_starts:
            self._start()

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts < len(START_DELAYS):
            delay = START_DELAYS[self._failed_starts]
            self._next_start = time.monotonic() + delay
            log.warning(f"{self.what}: one died while starting ({self._last_death}); next start in {delay:g} s")


def _cause(code: int | None) -> str:
    if code is None:
        return "it closed its pipe"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
