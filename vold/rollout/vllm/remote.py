"""vLLM engines in processes of their own (`vold serve`), reached over HTTP: requests go to whoever has the least to do,
weights travel as safetensors files in shared memory or over NCCL.

An engine that dies, hangs, or answers nonsense is named on standard error, gets no more requests, and what it owed is
sent to another. One that was started again has the wrong weights, says so with every answer, and is given the right
ones before it is used. A request is a prompt with all its responses, so there is never half a group; one that failed
too often, while the engines answer others, is given up.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.models.tokenizer import load_tokenizer
from vold.parallel.collectives import run_on_all_ranks
from vold.rollout.vllm import weight_stream
from vold.rollout.vllm.engines import Answer, Request
from vold.rollout.vllm.http import Calls, EngineFailed, call_workers, generate, get, post

ResultT = TypeVar("ResultT")

IN_FLIGHT = 128
"""Requests an engine is given at a time: more than it runs side by side, so that it never waits for one."""
PART_BYTES = 1 << 30
"""A file of weights is written when it has so many: what the writing rank holds of the stream at a time."""
TRIAL = Request((0,), (), {"max_tokens": 1, "temperature": 0.0})
"""What an engine that failed must answer before it is asked again."""


@dataclass(eq=False)
class LiveEngine:
    """An engine from when it was found until it is lost; found again, it is another."""

    url: str
    requests: int = 0  # of this rank, under way


class RemoteEngines:
    """Every rank has one and asks the same engines; rank 0 gives them their weights."""

    def __init__(self, checkpoint: Path, settings: VllmConfig, *, temperature: float = 1.0):
        if not settings.weights_dir.is_dir():
            raise ValueError(f"vllm.weights_dir = {settings.weights_dir} is no directory; choose another")
        self._settings = settings
        self._prepare = [len(load_tokenizer(checkpoint)), temperature]  # PolicyWorker.prepare_policy's
        self._leads = not dist.is_initialized() or dist.get_rank() == 0
        self._provides = True  # a lost engine with its weights; the checkpoint's, every rank can
        self._directory: Path | None = checkpoint.resolve()  # of the weights in use; None when they came by a stream
        self._files: tempfile.TemporaryDirectory | None = None
        self._living: dict[str, LiveEngine] = {}  # by url
        self._lock = threading.Lock()
        self._deadline: float | None = None  # for an engine to be there, while there is none
        self._patience = max(settings.restart_seconds, 10.0)  # with an engine that failed
        self._next_look = time.monotonic() + self._patience  # for engines that were lost
        self._run = self._from_leader(lambda: secrets.token_hex(4))
        self._label = f"{self._run}-0"
        self._set_engines(self._from_leader(self._provide_each))

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | None]]:
        """See Engines. Raises ValueError when no engine is left."""
        self._look_again()
        calls = Calls()
        with ThreadPoolExecutor(max_workers=IN_FLIGHT * len(self._settings.urls)) as pool:
            places = {pool.submit(self._answer, request, calls): place for place, request in enumerate(requests)}
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            finally:  # all are done, or nobody waits for the rest
                pool.shutdown(wait=False, cancel_futures=True)
                calls.break_off()

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Engines. Engines that were lost are tried again."""
        previous, self._label, self._provides = self._files, f"{self._run}-{version}", self._leads
        stream = iter(named_weights)

        def rest() -> None:
            """Ranks stream together: none stops before the end, whatever happens to the weights."""
            deque(stream, maxlen=0)

        def hand_out() -> list[str]:
            try:
                return self._send_each(stream) if goes_by_stream(self._settings) else self._write_and_provide(stream)
            finally:
                rest()

        self._set_engines(self._from_leader(hand_out, meanwhile=rest))
        if previous:
            previous.cleanup()

    # -- requests --------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, calls: Calls) -> Answer | None:
        failed = []
        for _ in range(1 + self._settings.retries):
            if calls.broken_off:
                return None
            engine = self._take_turn()
            try:
                return generate(engine.url, request, self._label, self._settings.timeout, calls)
            except EngineFailed as failure:
                if calls.broken_off:
                    return None
                self._drop(engine, failure)
                failed.append(engine.url)
            finally:
                with self._lock:
                    engine.requests -= 1
        self._reinstate(failed)
        return None

    def _take_turn(self) -> LiveEngine:
        """The living engine with the fewest requests."""
        with self._lock:
            if not self._living:
                self._admit(self._wait_for_one(self._ready))
            engine = min(self._living.values(), key=lambda engine: engine.requests)
            engine.requests += 1
            return engine

    def _admit(self, url: str) -> None:
        self._living[url] = LiveEngine(url)

    def _drop(self, engine: LiveEngine, reason: Exception) -> None:
        """Once, however many requests it owed; not when it has been lost and found meanwhile."""
        with self._lock:
            if self._living.get(engine.url) is engine:
                del self._living[engine.url]
                print(f"vold: engine {engine.url} gets no more requests: {reason}", file=sys.stderr, flush=True)

    def _reinstate(self, urls: Sequence[str]) -> None:
        """A request failed on all of these, so it may be to blame: those that answer another go on. Raises ValueError
        when no engine does."""
        with self._lock:
            self._readmit(urls)
            if not self._living:
                self._admit(self._wait_for_one(self._ready))

    def _look_again(self) -> None:
        """Now and then: an engine that was started again need not wait for the next weights; a teacher's never come."""
        with self._lock:
            if time.monotonic() >= self._next_look:
                self._readmit(self._settings.urls)
                self._next_look = time.monotonic() + self._patience

    def _readmit(self, urls: Sequence[str]) -> None:
        for url in set(urls) - self._living.keys():
            if self._ready(url):
                self._admit(url)
                print(f"vold: engine {url} answers and gets requests again", file=sys.stderr, flush=True)

    def _wait_for_one(self, ready: Callable[[str], bool]) -> str:
        """No engine is left: the first that is there again, with its weights. Whoever asks later waits no longer."""
        first = self._deadline is None
        self._deadline = self._deadline or time.monotonic() + self._settings.restart_seconds
        while first or time.monotonic() < self._deadline:
            first = False
            for url in self._settings.urls:
                if ready(url):
                    self._deadline = None
                    return url
            time.sleep(max(min(1.0, self._deadline - time.monotonic()), 0.0))
        raise ValueError(
            f"no vLLM engine of {', '.join(self._settings.urls)} answers (waited vllm.restart_seconds = "
            f"{self._settings.restart_seconds:g}); start them with `vold serve`, then --resume"
        )

    def _ready(self, url: str) -> bool:
        """Whether the engine is there, answers, and has this version's weights. Trained ones are rank 0's to provide,
        other ranks wait for that."""
        try:
            if self._provides:
                self._provide(url)
            if get(url, "/weight_info").get("weight_version") != self._label:
                return False
            generate(url, TRIAL, self._label, self._patience)
            return True
        except EngineFailed:
            return False

    # -- weights ---------------------------------------------------------------------------------------------------

    def _from_leader(self, action: Callable[[], ResultT], meanwhile: Callable[[], object] = lambda: None) -> ResultT:
        """Rank 0 acts, all know the result; its ValueError is everybody's."""
        if not dist.is_initialized():
            return action()
        return run_on_all_ranks(action if self._leads else meanwhile)[0]

    def _set_engines(self, urls: Sequence[str]) -> None:
        with self._lock:
            self._living = {url: LiveEngine(url) for url in urls}

    def _write_and_provide(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        self._files = tempfile.TemporaryDirectory(dir=self._settings.weights_dir, prefix="vold-weights-")
        self._directory = Path(self._files.name)
        _write_parts(weights, self._directory)
        return self._provide_each()

    def _provide_each(self) -> list[str]:
        """The engines that have this version, at least one."""
        return self._all_that(self._provide) or [self._wait_for_one(self._ready)]

    def _send_each(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """All engines that are there receive the stream together. One that dies in it takes the others' weights with
        it: the run stops."""
        self._directory = None
        urls = self._all_that(self._prepared) or [self._wait_for_one(lambda url: not _failure(self._prepared, url))]
        world, here = 1 + len(urls), _address_towards(min(urls, key=_is_here))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        store = weight_stream.open_store(here, world)
        with ThreadPoolExecutor(max_workers=len(urls)) as pool:
            received = [
                pool.submit(
                    call_workers, url, "receive_policy", [here, store.port, rank, world], self._settings.timeout
                )
                for rank, url in enumerate(urls, start=1)
            ]
            try:
                weight_stream.send(store, world, weights, device)
                for call in received:
                    call.result()
            except (OSError, EngineFailed) as error:
                raise ValueError(
                    f"weights were not handed over to all of {', '.join(urls)} (vllm.transport = "
                    f"{self._settings.transport!r}): {' '.join(str(error).split())[:200]}; start the engines that died "
                    "again, then --resume"
                ) from None
        return self._all_that(self._commit, urls) or [self._wait_for_one(self._ready)]

    def _all_that(self, action: Callable[[str], None], urls: Sequence[str] = ()) -> list[str]:
        """The engines with which it succeeds; the others are named."""
        urls = urls or self._settings.urls
        with ThreadPoolExecutor(max_workers=len(urls)) as pool:
            failures = dict(zip(urls, pool.map(partial(_failure, action), urls), strict=True))
        for url, failure in failures.items():
            if failure:
                print(f"vold: engine {url} is left out: {failure}", file=sys.stderr, flush=True)
        return [url for url, failure in failures.items() if not failure]

    def _provide(self, url: str) -> None:
        """Weights of this version to an engine that lacks them."""
        if get(url, "/weight_info").get("weight_version") == self._label:
            return
        if self._directory is None:
            raise EngineFailed("it gets weights with the next update")
        self._prepared(url)
        call_workers(url, "load_policy", [str(self._directory)], self._settings.timeout)
        self._commit(url)

    def _prepared(self, url: str) -> None:
        call_workers(url, "prepare_policy", self._prepare, self._settings.timeout)

    def _commit(self, url: str) -> None:
        """All three caches emptied, then the version's name: in this order, so that an engine that fails on the way
        never claims to be up to date."""
        limit = self._settings.timeout
        for cache in ("mm", "encoder"):
            post(url, f"/reset_{cache}_cache", {}, limit)
        patience = 20
        while not post(url, "/reset_prefix_cache", {}, limit)["success"]:  # requests we broke off may still be ending
            patience -= 1
            if not patience:
                raise EngineFailed("it kept its prefix cache over a weight update: requests are still running")
            time.sleep(0.25)
        post(url, "/update_weight_version", {"new_version": self._label}, limit)


def goes_by_stream(settings: VllmConfig) -> bool:
    """Whether weights go over NCCL. Files do as well within a machine, and who comes later can read them."""
    away = not all(map(_is_here, settings.urls))
    return settings.transport == "nccl" or (settings.transport == "auto" and away and torch.cuda.is_available())


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _failure(action: Callable[[str], None], url: str) -> EngineFailed | None:
    try:
        action(url)
    except EngineFailed as failure:
        return failure
    return None


def _address_towards(url: str) -> str:
    """This machine's, as the engine sees it."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=10.0) as connection:
        return connection.getsockname()[0]


def _write_parts(named_weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Safetensors files of about PART_BYTES. Raises ValueError when the disk is too small."""
    part: dict[str, Tensor] = {}

    def write() -> None:
        needed, free = sum(kept.nbytes for kept in part.values()), shutil.disk_usage(directory).free
        if needed > 0.95 * free:
            raise ValueError(
                f"vllm.weights_dir = {directory.parent} has {free / 2**30:.1f} GiB free, too little for the "
                "weights of two versions; choose another directory"
            )
        save_file(part, directory / f"part-{len(list(directory.iterdir())):05d}.safetensors")
        part.clear()

    for name, tensor in named_weights:
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(kept.nbytes for kept in part.values()) >= PART_BYTES:
            write()
    if part:
        write()
