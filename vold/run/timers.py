"""Seconds and memory of a step by named phases, with ranges for profilers (NVTX on CUDA)."""

from __future__ import annotations

import resource
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

GIB = 2**30


class Interval(NamedTuple):
    """One passage of a phase, in seconds since the run's `PhaseTimers` was made."""

    name: str
    thread: str
    start: float
    end: float


class PhaseTimers:
    """One rank's timers of the step in progress; `with timers(name)` may be nested and repeated.

    On CUDA a phase lies between two events on the stream, which are read when the step is over: work is charged to the
    phase that launched it, and no phase waits for the device. Memory is the phase's peak of what torch has allocated;
    on a CPU it is the process's resident memory when the phase ends.

    intervals   every passage of the last finished step, those of other threads included, for a timeline
    peak_gib    peak memory of the run so far, GiB
    """

    MAIN_THREAD = "train"

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._zero, self._host_zero = self._mark(), time.perf_counter()
        self._threads: list[ThreadTimers] = []
        self.intervals: list[Interval] = []
        self._spans: list[tuple[str, object, object]] = []
        self._without: dict[str, str] = {}
        self._open: list[str] = []
        self._memory: dict[str, float] = defaultdict(float)
        self.peak_gib = 0.0

    @contextmanager
    def __call__(self, name: str, *, without: str = "") -> Iterator[None]:
        """Charge what happens inside to phase `name`.

        without: a phase whose seconds, where it runs inside this one, are subtracted.
        """
        self._without |= {name: without} if without else {}
        self._note_memory()
        self._open.append(name)
        started = self._mark()
        try:
            with torch.profiler.record_function(name), _nvtx(name, self._cuda):
                yield
        finally:
            self._spans.append((name, started, self._mark()))
            self._note_memory()
            self._open.pop()

    def thread(self, name: str) -> ThreadTimers:
        """Timers for work in another thread: it appears in `intervals` and takes none of the step's seconds."""
        self._threads.append(ThreadTimers(name, self._host_zero))
        return self._threads[-1]

    def beside(self, name: str) -> BusyTimer:
        """The same for calls of phase `name` that others are under way with, any number of them at a time."""
        timer = BusyTimer(name, self._host_zero)
        self._threads.append(timer)
        return timer

    def finish_step(self) -> dict[str, float]:
        """`seconds_<phase>` and `memory_gib_<phase>` of the step that ends here; the next one starts from nothing."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        self.intervals = [interval for thread in self._threads for interval in thread.take_finished()]
        for name, started, ended in self._spans:
            seconds[name] += self._between(started, ended)
            start, end = self._between(self._zero, started), self._between(self._zero, ended)
            self.intervals.append(Interval(name, self.MAIN_THREAD, start, end))
        for name, inner in self._without.items():
            if name in seconds:
                seconds[name] -= seconds.get(inner, 0.0)
        self._note_memory()
        if not self._cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
            # the kernel's maximum may lag behind a reading of the present size by some pages
            self.peak_gib = max(self.peak_gib, peak, *self._memory.values())
        metrics = {f"seconds_{name}": value for name, value in seconds.items()}
        metrics |= {f"memory_gib_{name}": value for name, value in self._memory.items()}
        self._spans, self._memory = [], defaultdict(float)
        return metrics

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, started, ended) -> float:
        return started.elapsed_time(ended) / 1000 if self._cuda else ended - started

    def _note_memory(self) -> None:
        """Charge the memory used since the last note to every open phase. Both readings are on the host, without
        waiting for the device."""
        if self._cuda:
            used = torch.cuda.max_memory_allocated() / GIB
            self.peak_gib = max(self.peak_gib, used)
            torch.cuda.reset_peak_memory_stats()
        else:
            used = psutil.Process().memory_info().rss / GIB
        for name in self._open:
            self._memory[name] = max(self._memory[name], used)


class ThreadTimers:
    """Timers of one thread beside the step's. They use the host's clock: this work waits for its tokens anyway."""

    def __init__(self, name: str, zero: float) -> None:
        self._name, self._zero = name, zero
        self._finished: deque[Interval] = deque()  # filled by its own thread, emptied by the step's

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter() - self._zero
        try:
            with torch.profiler.record_function(name), _nvtx(name, torch.cuda.is_available()):
                yield
        finally:
            self._finished.append(Interval(name, self._name, started, time.perf_counter() - self._zero))

    def take_finished(self) -> Iterator[Interval]:
        """Intervals that have ended since the last call."""
        while self._finished:
            yield self._finished.popleft()


class BusyTimer(ThreadTimers):
    """When at least one call was under way, in somebody else's process: intervals of one thread that do not overlap."""

    def __init__(self, name: str, zero: float) -> None:
        super().__init__(name, zero)
        self._lock, self._calls, self._since = threading.Lock(), 0, 0.0

    def begin(self) -> None:
        """A call begins."""
        with self._lock:
            if not self._calls:
                self._since = time.perf_counter() - self._zero
            self._calls += 1

    def end(self) -> None:
        """A call has its answer."""
        with self._lock:
            self._calls -= 1
            if not self._calls:
                now = time.perf_counter() - self._zero
                self._finished.append(Interval(self._name, self._name, self._since, now))


@contextmanager
def _nvtx(name: str, cuda: bool) -> Iterator[None]:
    if cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()
