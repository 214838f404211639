"""vLLM engines in processes of their own (`vold serve`), reached over HTTP: requests go to whoever has the least to do,
weights travel as safetensors files in shared memory.

An engine that dies, hangs, or answers nonsense is named on standard error, gets no more requests, and what it owed is
sent to another. One that was started again has the wrong weights, says so with every answer, and is given the right
ones before it is used. A request is a prompt with all its responses, so there is never half a group.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.data.pictures import read_picture
from vold.models.tokenizer import load_tokenizer
from vold.parallel.together import together
from vold.rollout.vllm_engines import Answer, Request, Response

ResultT = TypeVar("ResultT")

IN_FLIGHT = 128
"""Requests an engine is given at a time: more than it runs side by side, so that it never waits for one."""
PART_BYTES = 1 << 30
"""A file of weights is written when it has so many: what the writing rank holds of the stream at a time."""


class EngineFailed(Exception):
    """One line: what an engine did instead of answering."""


class RemoteEngines:
    """Every rank has one and asks the same engines; rank 0 gives them their weights."""

    def __init__(self, checkpoint: Path, settings: VllmConfig):
        if not settings.weights_dir.is_dir():
            raise ValueError(f"rollout.vllm.weights_dir = {settings.weights_dir} is no directory; choose another")
        self._settings = settings
        self._real_ids = len(load_tokenizer(checkpoint))
        self._leads = not dist.is_initialized() or dist.get_rank() == 0
        self._directory = checkpoint.resolve()  # of the weights in use
        self._files: tempfile.TemporaryDirectory | None = None
        self._running: dict[str, int] = {}  # requests of this rank, by engine that is alive
        self._lock = threading.Lock()
        self._deadline: float | None = None  # for an engine to be there, while there is none
        self._run = self._from_leader(lambda: secrets.token_hex(4))
        self._label = f"{self._run}-0"
        self._provide_all()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See Engines. Raises ValueError when a request failed too often or no engine is left."""
        with ThreadPoolExecutor(max_workers=IN_FLIGHT * len(self._settings.urls)) as pool:
            return list(pool.map(self._answer, requests))

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Engines. Engines that were lost are tried again."""
        previous = self._files
        if self._leads:
            self._files = tempfile.TemporaryDirectory(dir=self._settings.weights_dir, prefix="vold-weights-")
            self._directory = Path(self._files.name)
            _write_parts(named_weights, self._directory)
        else:
            for _ in named_weights:  # the shares this rank holds
                pass
        self._label = f"{self._run}-{version}"
        self._provide_all()
        if previous:
            previous.cleanup()

    # -- requests --------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer:
        body = _body(request)
        for _ in range(1 + self._settings.retries):
            url = self._take_turn()
            try:
                found = _post(url, "/inference/v1/generate", body, self._settings.timeout)
                return _read_answer(found, request.params.get("n", 1), self._label)
            except EngineFailed as failure:
                self._drop(url, failure)
            finally:
                self._end_turn(url)
        raise ValueError(
            f"a request failed {1 + self._settings.retries} times (rollout.vllm.retries = {self._settings.retries}), "
            "see above; the run stops, --resume continues after its latest checkpoint"
        )

    def _take_turn(self) -> str:
        """The living engine with the fewest requests."""
        with self._lock:
            if not self._running:
                self._running[self._wait_for_one()] = 0
            url = min(self._running, key=self._running.__getitem__)
            self._running[url] += 1
            return url

    def _end_turn(self, url: str) -> None:
        with self._lock:
            if url in self._running:
                self._running[url] = max(self._running[url] - 1, 0)  # 0 already when it was lost and is back

    def _drop(self, url: str, reason: Exception) -> None:
        with self._lock:
            if self._running.pop(url, None) is not None:
                print(f"vold: engine {url} gets no more requests: {reason}", file=sys.stderr, flush=True)

    def _wait_for_one(self) -> str:
        """No engine is left: the first that is there again, with its weights. Whoever asks later waits no longer."""
        self._deadline = self._deadline or time.monotonic() + self._settings.restart_seconds
        while time.monotonic() < self._deadline:
            for url in self._settings.urls:
                if self._ready(url):
                    self._deadline = None
                    return url
            time.sleep(1.0)
        raise ValueError(
            f"no vLLM engine of {', '.join(self._settings.urls)} answers (waited rollout.vllm.restart_seconds = "
            f"{self._settings.restart_seconds:g}); start them with `vold serve`, then --resume"
        )

    def _ready(self, url: str) -> bool:
        """Whether the engine is there with this version's weights; rank 0 sees to it, other ranks wait for that."""
        try:
            if self._leads:
                self._provide(url)
            return _get(url, "/weight_info").get("weight_version") == self._label
        except EngineFailed:
            return False

    # -- weights ---------------------------------------------------------------------------------------------------

    def _from_leader(self, action: Callable[[], ResultT]) -> ResultT:
        """Rank 0 acts, all know the result; its ValueError is everybody's."""
        if not dist.is_initialized():
            return action()
        return together(action if self._leads else lambda: None)[0]

    def _provide_all(self) -> None:
        """All engines that can have this version have it. Raises ValueError when there is none."""
        ready = self._from_leader(self._provide_each)
        with self._lock:
            self._running = dict.fromkeys(ready, 0)

    def _provide_each(self) -> list[str]:
        with ThreadPoolExecutor(max_workers=len(self._settings.urls)) as pool:
            failures = dict(zip(self._settings.urls, pool.map(self._attempt, self._settings.urls), strict=True))
        for url, failure in failures.items():
            if failure:
                print(f"vold: engine {url} is left out: {failure}", file=sys.stderr, flush=True)
        return [url for url, failure in failures.items() if not failure] or [self._wait_for_one()]

    def _attempt(self, url: str) -> EngineFailed | None:
        try:
            self._provide(url)
        except EngineFailed as failure:
            return failure
        return None

    def _provide(self, url: str) -> None:
        """Weights of this version, all three caches emptied, then the version's name: in this order, so that an engine
        that fails on the way never claims to be up to date."""
        if _get(url, "/weight_info").get("weight_version") == self._label:
            return
        limit = self._settings.timeout
        _call_workers(url, "prepare_policy", [self._real_ids], limit)
        _call_workers(url, "load_policy", [str(self._directory)], limit)
        for cache in ("mm", "encoder"):
            _post(url, f"/reset_{cache}_cache", {}, limit)
        if not _post(url, "/reset_prefix_cache", {}, limit)["success"]:
            raise EngineFailed("it kept its prefix cache over a weight update: requests are still running")
        _post(url, "/update_weight_version", {"new_version": self._label}, limit)


def _write_parts(named_weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Safetensors files of about PART_BYTES. Raises ValueError when the disk is too small."""
    part: dict[str, Tensor] = {}

    def write() -> None:
        needed, free = sum(kept.nbytes for kept in part.values()), shutil.disk_usage(directory).free
        if needed > 0.95 * free:
            raise ValueError(
                f"rollout.vllm.weights_dir = {directory.parent} has {free / 2**30:.1f} GiB free, too little for the "
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


# -- HTTP ----------------------------------------------------------------------------------------------------------

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are never behind a proxy


def _post(url: str, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    return _send(urllib.request.Request(url + path, json.dumps(body).encode(), headers), timeout)


def _get(url: str, path: str) -> dict[str, Any]:
    return _send(urllib.request.Request(url + path), timeout=10.0)


def _send(request: urllib.request.Request, timeout: float) -> dict[str, Any]:
    """The JSON object it answers. Raises EngineFailed for whatever else happens."""
    try:
        with _DIRECT.open(request, timeout=timeout) as reply:
            text = reply.read()
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}: {_one_line(error.read())}"
        if error.code < 500:  # the question is wrong, whoever is asked
            raise ValueError(f"{request.full_url}: {reason}; is it an engine of `vold serve`?") from None
        raise EngineFailed(reason) from None
    except OSError as error:  # refused, reset, timed out
        raise EngineFailed(str(getattr(error, "reason", "") or error or type(error).__name__)) from None
    except Exception as error:  # half an answer: http.client.IncompleteRead and its kin
        raise EngineFailed(f"{type(error).__name__}: {error}") from None
    try:
        answer = json.loads(text or b"{}")
    except ValueError:
        raise EngineFailed(f"an answer that is not JSON: {_one_line(text)}") from None
    return answer if isinstance(answer, dict) else {"": answer}


def _one_line(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:200]


def _call_workers(url: str, method: str, arguments: list, timeout: float) -> None:
    _post(url, "/collective_rpc", {"method": method, "args": arguments}, timeout)


def _body(request: Request) -> dict[str, Any]:
    body = {"token_ids": list(request.token_ids), "sampling_params": {**request.params, "detokenize": False}}
    if request.images:
        body["content_parts"] = [{"type": "image_url", "url": _data_url(path)} for path in request.images]
    return body


def _data_url(path: Path) -> str:
    """The pixels that the trainer sees, not the file: the server would read transparency and 16 bits in its own way."""
    png = io.BytesIO()
    read_picture(path).save(png, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _read_answer(found: dict[str, Any], expected_responses: int, label: str) -> Answer:
    """Raises EngineFailed for anything but complete responses by the weights called `label`."""
    try:
        responses = [_read_response(choice, label) for choice in found["choices"]]
        steps = [step for step in found["prompt_logprobs"] or [] if step]
        answer = Answer(responses, [next(iter(step.values()))["logprob"] for step in steps])
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise EngineFailed(f"an answer of the wrong shape ({type(error).__name__}: {error})") from None
    if len(responses) != expected_responses:
        raise EngineFailed(f"{len(responses)} responses where {expected_responses} were asked for")
    return answer


def _read_response(choice: dict[str, Any], label: str) -> Response:
    versions = {span["version"] for span in choice["weight_versions"]}
    if versions != {label}:
        raise EngineFailed(
            f"it answers with weights {sorted(versions)}, not {label!r}: it was started again, or serves another run"
        )
    ids = choice["token_ids"]
    steps = (choice["logprobs"] or {"content": []})["content"]
    if steps and [step["token_id"] for step in steps] != ids:
        raise EngineFailed("log-probs of other tokens than it sampled")
    return Response(ids, [step["logprob"] for step in steps])
