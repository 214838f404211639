"""A pool of grading worker processes; a worker whose answer hangs is killed and replaced.

`concurrent.futures` cannot do this: `future.result(timeout)` leaves the hung worker in place, so two bad answers
poison a two-worker pool and later correct answers score 0. Workers are plain child processes that exchange JSON lines,
which also works under torchrun: nothing is forked after CUDA starts and the main module is not imported again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vold.grading.equality import Undecided, decide
from vold.grading.extract import extract_answer
from vold.grading.gold import validate_gold

if TYPE_CHECKING:
    from vold.types import Verdict

MAX_BYTES = 1 << 30
START_SECONDS = 300.0  # a second where there is CPU
_FAILED_STARTS = 3
_PATIENCE = 10  # a worker that gets little CPU may take this many times `seconds`: slow is not hung
# How a worker ends through its answer: out of CPU time, or crashed. (SIGKILL comes from outside: the system's or ours.)
_TIMEOUT = -signal.SIGPROF
_CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)


@dataclass
class _Job:
    question: Undecided | None = None
    deaths: int = 0
    started: float = 0.0
    seconds: float = 0.0
    outcome: str = ""  # "" while open, then correct, wrong or broken
    rule: str = ""

    def close(self, outcome: str, rule: str) -> None:
        self.outcome, self.rule = outcome, rule
        self.seconds = time.monotonic() - self.started


class _Worker:
    """The parent's end of one worker process. Starting one takes about a second; it reports when it is ready."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.ready, self.job, self.buffer = seconds, False, None, b""
        self.deadline = time.monotonic() + START_SECONDS
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vold.grading.worker", str(seconds), str(MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"},
        )

    def send(self, job: _Job) -> None:
        """Raises OSError if the worker is gone."""
        line = json.dumps({"answer": job.question.answer, "gold": job.question.gold})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        self.job, job.started = job, time.monotonic()
        self.deadline = job.started + _PATIENCE * self.seconds

    def receive(self) -> list[dict] | None:
        """Messages that have arrived, None once the worker has died."""
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def exit_code(self) -> int | None:
        """Exit code of a worker whose pipe has closed; None while it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0)
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes for a process that is gone
                pipe.close()


class Grader:
    """Grades responses; use as a context manager. Not for several threads at once.

    workers     processes, started when an answer first needs one
    seconds     CPU time of one answer in a worker; the kernel kills one that takes longer, and it is replaced. One that
                gets too little CPU is waited for, 10 times as long at most
    max_chars   longer answers are wrong ("too_long") without being read
    counters    since construction: timeouts, respawns (replacements for any reason), broken
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, max_chars: int = 4096) -> None:
        if workers < 1 or seconds <= 0 or max_chars < 1:
            raise ValueError(
                f"Grader needs workers >= 1, seconds > 0 and max_chars >= 1, got {workers}, {seconds} and {max_chars}"
            )
        self.size, self.seconds, self.max_chars = workers, seconds, max_chars
        self.counters = {"timeouts": 0, "respawns": 0, "broken": 0}
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. They also end when this process does."""
        for worker in list(self._workers):
            self._remove(worker)

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """Verdicts for (response, gold, truncated), in order.

        Truncated, boxless and oversized answers are wrong; so are those that hang ("timeout"), raise ("unparsed") or
        crash the worker twice ("crashed"). `broken` (mask the sample) is never the answer's doing: a worker killed
        twice from outside ("worker_died"), one that got no CPU ("starved"), a gold that `validate_gold` refuses
        ("gold") or that raises by itself (the exception's name).
        """
        from vold.types import Verdict  # records import torch, which workers must not

        jobs: dict[Undecided, _Job] = {}  # a question is asked once, however many responses give the answer
        graded = [self._open(response, gold, truncated, jobs) for response, gold, truncated in items]
        self._run(list(jobs.values()))
        verdicts = [Verdict(job.outcome, answer, job.rule, job.seconds, gold) for answer, gold, job in graded]
        self.counters["broken"] += sum(verdict.outcome == "broken" for verdict in verdicts)
        return verdicts

    def _open(
        self, response: str, gold: str, truncated: bool, jobs: dict[Undecided, _Job]
    ) -> tuple[str | None, str, _Job]:
        """(answer, normalised gold, job): closed already where the policy decides, else one of `jobs`."""
        job = _Job(started=time.monotonic())
        answer = None if truncated else extract_answer(response)
        try:
            normal = validate_gold(gold)
        except ValueError:
            job.close("broken", "gold")
            return answer, "", job
        if answer is None:
            job.close("wrong", "truncated" if truncated else "no_answer")
        elif len(answer) > self.max_chars:
            job.close("wrong", "too_long")
        else:
            decision = decide(answer, gold)
            if isinstance(decision, Undecided):
                return answer, normal, jobs.setdefault(decision, _Job(decision))
            job.close("correct" if decision[0] else "wrong", decision[1])
        return answer, normal, job

    def _run(self, jobs: list[_Job]) -> None:
        waiting = deque(jobs)
        for worker in [w for w in self._workers if w.job is not None]:  # left by an interrupted call
            self._remove(worker)
        while unfinished := sum(not job.outcome for job in jobs):
            while len(self._workers) < min(self.size, unfinished):
                self._start()
            self._dispatch(waiting)
            self._collect(waiting)
            self._expire()

    def _dispatch(self, waiting: deque[_Job]) -> None:
        for worker in list(self._workers):
            if waiting and worker.ready and worker.job is None:
                try:
                    worker.send(waiting[0])
                    waiting.popleft()
                except OSError:
                    self._replace(worker)  # died while idle: not this answer's fault

    def _collect(self, waiting: deque[_Job]) -> None:
        pending = [worker.deadline for worker in self._workers if worker.job is not None or not worker.ready]
        timeout = max(0.0, min(pending, default=0.0) - time.monotonic())
        for key, _ in self._selector.select(timeout):
            worker: _Worker = key.data
            messages = worker.receive()
            if messages is None:
                self._handle_death(worker, waiting)
            else:
                for message in messages:
                    self._accept(worker, message)

    def _accept(self, worker: _Worker, message: dict) -> None:
        if "failed" in message:
            raise RuntimeError(f"grading worker cannot start: {message['failed']}; is math-verify installed?")
        if "ready" in message:
            worker.ready, self._failed_starts = True, 0
            return
        job, worker.job = worker.job, None
        if "error" in message:
            job.close("broken", message["error"])
        else:
            job.close("correct" if message["equal"] else "wrong", message["rule"])
        if message["retire"]:
            self._replace(worker)

    def _handle_death(self, worker: _Worker, waiting: deque[_Job]) -> None:
        """Replace a dead worker. An answer that ran out of CPU time is wrong; after any other death it is tried once
        more, because something else may have been the cause."""
        job, code = worker.job, worker.exit_code()
        self._replace(worker)
        if job is None:
            return
        job.deaths += 1
        if code == _TIMEOUT:
            self.counters["timeouts"] += 1
            job.close("wrong", "timeout")
        elif job.deaths < 2:
            waiting.appendleft(job)
        elif code in _CRASHES:
            job.close("wrong", "crashed")
        else:
            job.close("broken", "worker_died")

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now < worker.deadline or (worker.ready and worker.job is None):
                continue
            if worker.job is not None:
                worker.job.close("broken", "starved")
            self._replace(worker)

    def _start(self) -> None:
        worker = _Worker(self.seconds)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker: _Worker) -> None:
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._failed_starts += not worker.ready
        self._remove(worker)
        if self._failed_starts >= _FAILED_STARTS:
            raise RuntimeError(f"grading workers died {_FAILED_STARTS} times in a row while starting; out of memory?")
        self.counters["respawns"] += 1
        self._start()
