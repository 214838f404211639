"""vLLM engines in processes of their own (`vold serve`), reached over HTTP: requests go to the engine with the fewest
under way, weights travel as safetensors files in shared memory or over NCCL.

An engine that dies, hangs, or gives an invalid answer is named in a warning and gets no more requests; those it had go
to another engine. An engine that was started again has other weights, which every answer's version shows; it gets the
right ones before it is used. A request is a prompt with all its responses, so a group is never incomplete. A request
that failed too often, while engines answer others, is given up.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.io import log
from vold.models.tokenizer import id_bound, load_tokenizer
from vold.parallel.collectives import run_on_all_ranks
from vold.rollout.vllm import weight_files, weight_stream
from vold.rollout.vllm.adapters import EngineAdapter
from vold.rollout.vllm.engine_pool import EnginePool
from vold.rollout.vllm.engines import EngineOutput, Request
from vold.rollout.vllm.guard import read_secret
from vold.rollout.vllm.http import UNIX, Address, Cancellation, EngineFailed, call_workers, generate, get, post
from vold.run import leftovers

ResultT = TypeVar("ResultT")

IN_FLIGHT = 128
"""Requests an engine is given at a time: more than it runs side by side, so that it never waits for one."""
TRIAL = Request((0,), (), {"max_tokens": 1, "temperature": 0.0})
"""The request that an engine which failed must answer before it gets others."""
RESET_ATTEMPTS, RESET_PAUSE = 20, 0.25
"""Attempts to empty an engine's prefix cache, and seconds between them: cancelled requests may still be ending."""


class RemoteEngines:
    """Every rank has one of these and uses the same engines; rank 0 syncs their weights (see Engines), or with
    `adapter` adapters. keep_requests: requests of other threads are under way then. Each engine is paused, keeps them,
    and goes on with the new weights and keys and values of their own."""

    def __init__(
        self,
        checkpoint: Path,
        settings: VllmConfig,
        *,
        temperature: float = 1.0,
        adapter: EngineAdapter | None = None,
        keep_requests: bool = False,
    ):
        if adapter and syncs_by_stream(settings):
            raise ValueError(
                "adapter.sync = adapter travels in files: set vllm.transport=files, with a vllm.weights_dir that the "
                "engines can read, or adapter.sync=merged"
            )
        if not settings.weights_dir.is_dir():
            raise ValueError(f"vllm.weights_dir = {settings.weights_dir} is no directory; choose another")
        self._settings, self._adapter, self._keep_requests = settings, adapter, keep_requests
        self._providing = threading.RLock()  # weights go to engines from one thread at a time
        self._prepare_arguments = [id_bound(load_tokenizer(checkpoint)), temperature]  # of PolicyWorker.prepare_policy
        self._adapters: dict[str, str] = {}  # of each engine: the name of its last one
        self._workers: dict[str, int] = {}  # of each engine that was prepared: one for each of its GPUs
        self._is_leader = not dist.is_initialized() or dist.get_rank() == 0
        self._can_provide = True  # this rank may load weights into a restarted engine: every rank the checkpoint's
        self._directory: Path | None = checkpoint.resolve()  # of the weights in use; None when they came by a stream
        self._files: tempfile.TemporaryDirectory | None = None
        self._secret = self._on_leader(lambda: read_secret(settings.secret_file) if settings.secret_file else "")
        self._pool = EnginePool(settings.urls, settings.restart_seconds, self._is_ready)
        if self._is_leader:
            leftovers.remove(leftovers.dead_weights(settings.weights_dir))
        self._run = self._on_leader(lambda: secrets.token_hex(4))
        self._label = f"{self._run}-0"
        self._pool.set_engines(self._on_leader(self._provide_all))

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, EngineOutput | None]]:
        """See Engines. Raises ValueError when no engine is left."""
        self._pool.check_lost()
        cancellation = Cancellation()
        with ThreadPoolExecutor(max_workers=IN_FLIGHT * len(self._settings.urls)) as threads:
            indices = {threads.submit(self._output, request, cancellation): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(indices):
                    yield indices[future], future.result()
            finally:  # all are done, or the caller stopped early
                threads.shutdown(wait=False, cancel_futures=True)
                cancellation.cancel()

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Engines. Engines that were lost are tried again."""
        previous, weights = self._files, iter(named_weights)
        with self._providing:
            self._label, self._can_provide = f"{self._run}-{version}", self._is_leader

        def exhaust() -> None:
            """Ranks stream together: each reads to the end, whatever happens to the weights."""
            deque(weights, maxlen=0)

        def sync() -> list[str]:
            try:
                with self._providing:
                    return self._send(weights) if syncs_by_stream(self._settings) else self._write_and_provide(weights)
            finally:
                exhaust()

        self._pool.set_engines(self._on_leader(sync, others=exhaust))
        if previous:
            previous.cleanup()

    def _output(self, request: Request, cancellation: Cancellation) -> EngineOutput | None:
        failed_urls = []
        for _ in range(1 + self._settings.retries):
            if cancellation.cancelled:
                return None
            with self._pool.least_busy() as engine:
                try:
                    return self._generate(engine.url, request, cancellation)
                except EngineFailed as failure:
                    if cancellation.cancelled:
                        return None
                    self._pool.drop(engine, failure)
                    failed_urls.append(engine.url)
        self._pool.reinstate(failed_urls)
        return None

    def _generate(self, url: str, request: Request, cancellation: Cancellation) -> EngineOutput:
        output = generate(self._at(url), request, self._version_of, self._settings.timeout, cancellation)
        if any(token >= self._prepare_arguments[0] for response in output.responses for token in response.ids):
            raise EngineFailed("ids that the tokenizer does not have")
        return output

    def _version_of(self, label: str) -> int | None:
        """The number of the weights of now, or where requests are kept of any that were before."""
        run, _, number = label.rpartition("-")
        now = int(self._label.rpartition("-")[2])
        if run != self._run or not number.isdecimal() or int(number) > now:
            return None
        return int(number) if self._keep_requests or int(number) == now else None

    def _at(self, url: str) -> Address:
        has_adapter = self._adapter is not None and self._label != f"{self._run}-0"
        return Address(url, self._secret, adapter=self._label if has_adapter else "")

    def _is_ready(self, url: str) -> bool:
        """The engine answers, with this version's weights. Only rank 0 can provide trained weights; other ranks wait
        for that."""
        try:
            if self._can_provide:
                with self._providing:
                    self._provide(url)
            if get(self._at(url), "/weight_info").get("weight_version") != self._label:
                return False
            generate(self._at(url), TRIAL, self._version_of, self._pool.check_seconds)
            return True
        except EngineFailed:
            return False

    # -- weights ---------------------------------------------------------------------------------------------------

    def _on_leader(self, action: Callable[[], ResultT], others: Callable[[], object] = lambda: None) -> ResultT:
        """Rank 0's result of `action` on every rank; its ValueError is raised on every rank."""
        if not dist.is_initialized():
            return action()
        return run_on_all_ranks(action if self._is_leader else others)[0]

    def _write_and_provide(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        self._files = tempfile.TemporaryDirectory(dir=self._settings.weights_dir, prefix=leftovers.weights_prefix())
        self._directory = Path(self._files.name).resolve()
        leftovers.sign(self._directory)
        if self._adapter is not None:
            self._directory = self._adapter.write(weights, self._directory)
        else:
            weight_files.write_parts(weights, self._directory)
        return self._provide_all()

    def _provide_all(self) -> list[str]:
        """The engines that have this version's weights, at least one."""
        return self._successful(self._provide) or [self._pool.wait_for_one()]

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Stream the weights to all reachable engines at once. When one dies meanwhile, the others' weights are
        incomplete: raises ValueError."""
        self._directory = None
        urls = self._successful(self._prepare)
        urls = urls or [self._pool.wait_for_one(lambda url: not _failure(self._prepare, url))]
        with ExitStack() as paused:
            for url in urls:
                paused.enter_context(self._paused(url))
            self._stream_to(urls, weights)
            return self._successful(self._commit, urls) or [self._pool.wait_for_one()]

    def _stream_to(self, urls: Sequence[str], weights: Iterable[tuple[str, Tensor]]) -> None:
        first_ranks = list(accumulate((self._workers[url] for url in urls), initial=1))
        world, address = first_ranks.pop(), _address_towards(min(urls, key=is_local))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        store = weight_stream.open_store(address, world)
        receive = partial(call_workers, method="receive_policy", timeout=self._settings.timeout)
        with ThreadPoolExecutor(max_workers=len(urls)) as threads:
            calls = [
                threads.submit(receive, self._at(url), arguments=[address, store.port, rank, world])
                for rank, url in zip(first_ranks, urls, strict=True)
            ]
            try:
                weight_stream.send(store, world, weights, device)
                for call in calls:
                    call.result()
            except (OSError, EngineFailed) as error:
                raise ValueError(
                    f"weights were not sent to all of {', '.join(urls)} (vllm.transport = "
                    f"{self._settings.transport!r}): {' '.join(str(error).split())[:200]}; start the engines that died "
                    "again, then --resume"
                ) from None

    def _successful(self, action: Callable[[str], None], urls: Sequence[str] = ()) -> list[str]:
        """The engines for which `action` succeeds; warnings name the others."""
        urls = urls or self._settings.urls
        with ThreadPoolExecutor(max_workers=len(urls)) as threads:
            failures = dict(zip(urls, threads.map(partial(_failure, action), urls), strict=True))
        for url, failure in failures.items():
            if failure:
                log.warning(f"engine {url} is left out: {failure}")
        return [url for url, failure in failures.items() if not failure]

    def _provide(self, url: str) -> None:
        """Load this version's weights into an engine that lacks them."""
        if get(self._at(url), "/weight_info").get("weight_version") == self._label:
            return
        if self._directory is None:
            raise EngineFailed("it gets weights with the next update")
        self._prepare(url)
        with self._paused(url):
            if self._adapter is None:
                call_workers(self._at(url), "load_policy", [str(self._directory)], self._settings.timeout)
            elif self._at(url).adapter:
                self._load_adapter(self._at(url))
            self._commit(url)

    @contextmanager
    def _paused(self, url: str) -> Iterator[None]:
        """Where requests are kept: inside, the engine computes none. Its keys and values are gone when it goes on."""
        if not self._keep_requests:
            yield
            return
        post(self._at(url), "/pause?mode=keep&clear_cache=true", {}, self._settings.timeout)
        try:
            yield
        finally:
            with suppress(EngineFailed):
                post(self._at(url), "/resume", {}, self._settings.timeout)

    def _load_adapter(self, engine: Address) -> None:
        """Give an engine this version's adapter, and take the one before. Either may be done already: an engine that
        was started again has none, one that failed in between has the new one."""
        timeout, previous = self._settings.timeout, self._adapters.get(engine.url)
        body = {"lora_name": engine.adapter, "lora_path": str(self._directory)}
        try:
            post(engine, "/v1/load_lora_adapter", body, timeout)
        except ValueError as error:
            if "has already been loaded" not in str(error):
                raise
        self._adapters[engine.url] = engine.adapter
        call_workers(engine, "keep_newest_adapter", [], timeout)
        if previous and previous != engine.adapter:
            with suppress(ValueError):
                post(engine, "/v1/unload_lora_adapter", {"lora_name": previous}, timeout)

    def _prepare(self, url: str) -> None:
        workers = call_workers(self._at(url), "prepare_policy", self._prepare_arguments, self._settings.timeout)
        self._workers[url] = max(len(workers), 1)

    def _commit(self, url: str) -> None:
        """Empty all three caches, then set the version's name: in this order, so that an engine that fails in between
        is never taken for up to date. Where requests are kept, the pause has emptied the prefix cache, and the others,
        of images, are in use; a tower that changes is refused (check_rl_config)."""
        timeout = self._settings.timeout
        if not self._keep_requests:
            self._empty_caches(url)
        post(self._at(url), "/update_weight_version", {"new_version": self._label}, timeout)

    def _empty_caches(self, url: str) -> None:
        timeout = self._settings.timeout
        for cache in ("mm", "encoder"):
            post(self._at(url), f"/reset_{cache}_cache", {}, timeout)
        for _ in range(RESET_ATTEMPTS):
            if post(self._at(url), "/reset_prefix_cache", {}, timeout)["success"]:
                return
            time.sleep(RESET_PAUSE)
        raise EngineFailed("it kept its prefix cache over a weight update: requests are still running")


def syncs_by_stream(settings: VllmConfig) -> bool:
    """True where weights go over NCCL. Within a machine files do as well, and a restarted engine can read them."""
    remote = not all(map(is_local, settings.urls))
    return settings.transport == "nccl" or (settings.transport == "auto" and remote and torch.cuda.is_available())


def is_local(url: str) -> bool:
    """Whether an engine is on this machine, by its address."""
    return url.startswith(UNIX) or urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _failure(action: Callable[[str], None], url: str) -> EngineFailed | None:
    try:
        action(url)
    except EngineFailed as failure:
        return failure
    return None


def _address_towards(url: str) -> str:
    """This machine's address, as the engine reaches it."""
    if url.startswith(UNIX):
        return "127.0.0.1"
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=10.0) as connection:
        return connection.getsockname()[0]
