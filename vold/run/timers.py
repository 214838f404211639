"""Where a step's time and memory go, by named phases: seconds, memory, and ranges for profilers (NVTX on CUDA)."""

from __future__ import annotations

import resource
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

GIB = 2**30


class Interval(NamedTuple):
    """One passage of a phase, in seconds since the run's `Phases` was made."""

    name: str
    lane: str
    start: float
    end: float


class Phases:
    """One rank's phases of the step in progress; `with phases(name)` may be nested and repeated.

    On CUDA a phase lies between two events on the stream, which are read when the step is over: work is charged to the
    phase that launched it, and no phase waits for the device. Memory is the phase's peak of what torch has allocated;
    on a CPU what is resident in the process when the phase ends.

    `intervals`: every passage of the step that was read last, those of `beside` included, for a timeline.
    """

    LANE = "train"

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._zero, self._host_zero = self._mark(), time.perf_counter()
        self._lanes: list[ThreadTimers] = []
        self.intervals: list[Interval] = []
        self._spans: list[tuple[str, object, object]] = []
        self._without: dict[str, str] = {}
        self._open: list[str] = []
        self._memory: dict[str, float] = defaultdict(float)
        self.peak_gib = 0.0  # of the run so far

    @contextmanager
    def __call__(self, name: str, *, without: str = "") -> Iterator[None]:
        """Adds what happens inside to phase `name`; `without`: less the seconds of this phase that ran inside it."""
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

    def beside(self, lane: str) -> ThreadTimers:
        """Phases of work in another thread: they take none of the step's seconds, and are there as intervals."""
        self._lanes.append(ThreadTimers(lane, self._host_zero))
        return self._lanes[-1]

    def read(self) -> dict[str, float]:
        """`seconds_<phase>` and `memory_gib_<phase>` of the step that ends here; the next one starts from nothing."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        self.intervals = [interval for lane in self._lanes for interval in lane.take()]
        for name, started, ended in self._spans:
            seconds[name] += self._between(started, ended)
            start, end = self._between(self._zero, started), self._between(self._zero, ended)
            self.intervals.append(Interval(name, self.LANE, start, end))
        for name, inner in self._without.items():
            if name in seconds:
                seconds[name] -= seconds.get(inner, 0.0)
        self._note_memory()
        if not self._cuda:
            self.peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        found = {f"seconds_{name}": value for name, value in seconds.items()}
        found |= {f"memory_gib_{name}": value for name, value in self._memory.items()}
        self._spans, self._memory = [], defaultdict(float)
        return found

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, started, ended) -> float:
        return started.elapsed_time(ended) / 1000 if self._cuda else ended - started

    def _note_memory(self) -> None:
        """What was used since the last note belongs to every open phase. Both readings are on the host, without
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
    """Phases of one thread beside the step. By the host's clock: what runs here waits for its tokens anyway."""

    def __init__(self, name: str, zero: float) -> None:
        self._name, self._zero = name, zero
        self._intervals: deque[Interval] = deque()  # filled by its own thread, emptied by the step's

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter() - self._zero
        try:
            with torch.profiler.record_function(name), _nvtx(name, torch.cuda.is_available()):
                yield
        finally:
            self._intervals.append(Interval(name, self._name, started, time.perf_counter() - self._zero))

    def take(self) -> Iterator[Interval]:
        """What has ended since the last call."""
        while self._intervals:
            yield self._intervals.popleft()


@contextmanager
def _nvtx(name: str, cuda: bool) -> Iterator[None]:
    if cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()
