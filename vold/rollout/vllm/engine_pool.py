"""The engines that get requests: the least busy one first, without those that failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vold.io import log


@dataclass(eq=False)
class LiveEngine:
    """An engine from when it was found until it is lost; found again, it is another object."""

    url: str
    requests: int = 0  # of this rank, under way


class EnginePool:
    """The live engines among `urls`; threads share it.

    restart_seconds  how long to wait for an engine when none is live
    is_ready         checks that the engine at a URL answers with the weights of now, which it may load for that
    """

    def __init__(self, urls: Sequence[str], restart_seconds: float, is_ready: Callable[[str], bool]):
        self._urls, self._restart_seconds, self._is_ready = urls, restart_seconds, is_ready
        self._live: dict[str, LiveEngine] = {}  # by url
        self._lock = threading.Lock()
        self._deadline: float | None = None  # of the wait for an engine, while none is live
        self.check_seconds = max(restart_seconds, 10.0)
        self.next_check = time.monotonic() + self.check_seconds  # of lost engines

    def set_engines(self, urls: Sequence[str]) -> None:
        """Replace the live engines: these have the weights of now."""
        with self._lock:
            self._live = {url: LiveEngine(url) for url in urls}

    @contextmanager
    def least_busy(self) -> Iterator[LiveEngine]:
        """The live engine with the fewest requests, counted as busy inside. Raises ValueError when none is left."""
        with self._lock:
            if not self._live:
                self._admit(self.wait_for_one())
            engine = min(self._live.values(), key=lambda engine: engine.requests)
            engine.requests += 1
        try:
            yield engine
        finally:
            with self._lock:
                engine.requests -= 1

    def drop(self, engine: LiveEngine, reason: Exception) -> None:
        """Send the engine no more requests. Does nothing when it was dropped already, or dropped and found again."""
        with self._lock:
            if self._live.get(engine.url) is engine:
                del self._live[engine.url]
                log.warning(f"engine {engine.url} gets no more requests: {reason}")

    def reinstate(self, urls: Sequence[str]) -> None:
        """Bring back those of `urls` that answer another request: the request that failed on all may have been the
        cause. Raises ValueError when no engine is left."""
        with self._lock:
            self._readmit(urls)
            if not self._live:
                self._admit(self.wait_for_one())

    def check_lost(self) -> None:
        """Readmit engines that were started again, once every `check_seconds`. They need not wait for the next weight
        sync; a teacher's engines have none."""
        with self._lock:
            if time.monotonic() >= self.next_check:
                self._readmit(self._urls)
                self.next_check = time.monotonic() + self.check_seconds

    def wait_for_one(self, is_ready: Callable[[str], bool] | None = None) -> str:
        """The first engine that is ready, within `restart_seconds` of when the last one was lost. Raises ValueError
        after that."""
        is_ready = is_ready or self._is_ready
        first = self._deadline is None
        self._deadline = self._deadline or time.monotonic() + self._restart_seconds
        while first or time.monotonic() < self._deadline:
            first = False
            for url in self._urls:
                if is_ready(url):
                    self._deadline = None
                    return url
            time.sleep(max(min(1.0, self._deadline - time.monotonic()), 0.0))
        raise ValueError(
            f"no vLLM engine of {', '.join(self._urls)} answers (waited vllm.restart_seconds = "
            f"{self._restart_seconds:g}); start them with `vold serve`, then --resume"
        )

    def _admit(self, url: str) -> None:
        self._live[url] = LiveEngine(url)

    def _readmit(self, urls: Sequence[str]) -> None:
        for url in set(urls) - self._live.keys():
            if self._is_ready(url):
                self._admit(url)
                log.warning(f"engine {url} answers and gets requests again")
