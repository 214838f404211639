"""HTTP requests to a `vold serve` engine, and the checks that an answer must pass."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, cast

import httpx2
from torch import Tensor

from vold.io import visible
from vold.rollout.vllm import hidden_states
from vold.rollout.vllm.engines import EngineOutput, Request, Response, SizedImage, scored_logps
from vold.rollout.vllm.guard import HEADER

UNIX = "unix:"

# One connection a request: an engine that was started again meets no connection of its predecessor's.
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
ADAPTER_DONE = b"Success: LoRA adapter "  # vLLM's answer to a call about an adapter is a sentence, not JSON
ANSWER_BYTES = 1 << 30  # 64 responses of 32768 tokens have some 150 MB


@dataclass(frozen=True)
class Address:
    """Where an engine is, http://host:port or unix:/path of its socket, and the secret that its run shares with it.
    adapter: the name of what its answers are computed with; "": the model that it serves."""

    url: str
    secret: str = field(default="", repr=False)
    adapter: str = ""


@cache
def _client(socket_path: str = "") -> httpx2.Client:
    transport = httpx2.HTTPTransport(uds=socket_path, limits=_LIMITS, trust_env=False) if socket_path else None
    return httpx2.Client(limits=_LIMITS, trust_env=False, transport=transport)


class EngineFailed(Exception):
    """An engine did not give a complete and valid answer; the message is one line."""


class Cancellation:
    """Ends requests under way by closing their connections: vLLM aborts the requests of a client that is gone."""

    def __init__(self) -> None:
        self.cancelled = False
        self._sockets: list[socket.socket] = []

    def cancel(self) -> None:
        """End all requests that were sent with this object, and every one that begins later."""
        self.cancelled = True
        for connected in list(self._sockets):
            with suppress(OSError):  # answered in this moment
                connected.shutdown(socket.SHUT_RDWR)

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Take note of a new connection (httpx2's `trace` extension)."""
        if event in ("connection.connect_tcp.complete", "connection.connect_unix_socket.complete"):
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self.cancelled:
                self.cancel()


VersionOf = Callable[[str], int | None]
"""The number of a version by its label; None for weights that may not answer."""


def generate(
    engine: Address, request: Request, version_of: VersionOf, timeout: float, cancellation: Cancellation | None = None
) -> EngineOutput:
    """The engine's output for one request. Raises EngineFailed for anything but a complete answer by weights whose
    version has a number."""
    body = {"token_ids": request.token_ids, "sampling_params": {**request.params, "detokenize": False}}
    if engine.adapter:
        body["model"] = engine.adapter
    if request.images:
        body["content_parts"] = [{"type": "image_url", "url": _data_url(image)} for image in request.images]
    answer = post(engine, "/inference/v1/generate", body, timeout, cancellation)
    try:
        output = EngineOutput(
            [_response(choice, version_of) for choice in answer["choices"]],
            scored_logps(request, [_scores(step) for step in answer["prompt_logprobs"] or []]),
        )
        numbers = chain(output.scored, *(response.logps for response in output.responses))
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a log-prob that is no number")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise EngineFailed(f"nonsense ({type(error).__name__}: {error})") from None
    expected = request.params.get("n", 1)
    if len(output.responses) != expected:
        raise EngineFailed(f"{len(output.responses)} responses where {expected} were asked for")
    if asked := hidden_states.asked_for(request.params):
        return replace(output, hidden_nE=_hidden_states(engine, *asked, timeout))
    return output


def call_workers(engine: Address, method: str, arguments: list, timeout: float) -> list:
    """Call a method of PolicyWorker in the engine's process; what each of its workers returns."""
    answer = post(engine, "/collective_rpc", {"method": method, "args": arguments}, timeout)
    results = answer.get("results")
    return results if isinstance(results, list) else []


def _hidden_states(engine: Address, name: str, rows: int, timeout: float) -> Tensor:
    """The [rows, E] that the engine has kept of a request. Raises EngineFailed where it has not, or sends another
    number of rows."""
    found = [value for value in call_workers(engine, "send_hidden_states", [name], timeout) if value is not None]
    try:
        rows_nE = hidden_states.from_json(found[0] if found else None)
    except (TypeError, ValueError) as error:
        raise EngineFailed(f"nonsense ({error})") from None
    if len(rows_nE) != rows:
        raise EngineFailed(f"hidden states of {len(rows_nE)} positions where {rows} were asked for")
    return rows_nE


def post(
    engine: Address, path: str, body: dict[str, Any], timeout: float, cancellation: Cancellation | None = None
) -> dict[str, Any]:
    """The JSON object that answers a POST. Raises EngineFailed for whatever else happens; ValueError where the request
    is wrong, so that every engine would refuse it."""
    return _send("POST", engine, path, body, timeout, cancellation)


def get(engine: Address, path: str, timeout: float = 10.0) -> dict[str, Any]:
    """The JSON object that answers a GET; errors as in `post`."""
    return _send("GET", engine, path, None, timeout, None)


def _send(
    method: str, engine: Address, path: str, body: dict | None, timeout: float, cancellation: Cancellation | None
) -> dict[str, Any]:
    extensions = {"trace": cancellation.trace} if cancellation else {}
    is_socket = engine.url.startswith(UNIX)
    client = _client(engine.url.removeprefix(UNIX)) if is_socket else _client()
    headers = {HEADER: engine.secret} if engine.secret else {}
    url = ("http://engine" if is_socket else engine.url) + path
    options = {"json": body, "timeout": timeout, "extensions": extensions, "headers": headers}
    try:
        with client.stream(method, url, **options) as reply:
            content = _bounded(reply)
    except (httpx2.HTTPError, OSError) as error:  # refused, reset, timed out, half an answer, no such socket
        raise EngineFailed(str(error) or type(error).__name__) from None
    if reply.status_code in (401, 403):
        raise ValueError(
            f"{engine.url}{path}: HTTP {reply.status_code}: {_one_line(content)}; start the engine with this run's "
            "config, or give both the same vllm.secret_file"
        )
    if reply.status_code >= 400:
        reason = f"HTTP {reply.status_code}: {_one_line(content)}"
        lacks_adapter = reply.status_code == 404 and body is not None and "model" in body  # it was started again
        if reply.status_code < 500 and not lacks_adapter:
            raise ValueError(f"{engine.url}{path}: {reason}; is it an engine of `vold serve`?")
        raise EngineFailed(reason)
    if content.startswith(ADAPTER_DONE):
        return {}
    try:
        answer = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        raise EngineFailed(f"an answer that is not JSON: {_one_line(content)}") from None
    return answer if isinstance(answer, dict) else {"": answer}


def _bounded(reply: httpx2.Response) -> bytes:
    """An answer's body. Raises EngineFailed for one without end."""
    content = bytearray()
    for chunk in reply.iter_bytes():
        content += chunk
        if len(content) > ANSWER_BYTES:
            raise EngineFailed(f"an answer of more than {ANSWER_BYTES} bytes")
    return bytes(content)


def _one_line(text: bytes) -> str:
    return visible(" ".join(text[:2000].decode(errors="replace").split())[:200])


def _data_url(image: SizedImage) -> str:
    """The pixels as a PNG, as the trainer reads them: the server would decode transparency and 16 bits differently from
    the file, and resize differently."""
    png = io.BytesIO()
    image.read().save(png, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _scores(step: dict[str, Any] | None) -> dict[int, float]:
    return {int(token): entry["logprob"] for token, entry in (step or {}).items()}


def _response(choice: dict[str, Any], version_of: VersionOf) -> Response:
    labels = sorted({span["version"] for span in choice["weight_versions"]})
    numbers = {label: version_of(label) for label in labels}
    if not labels or None in numbers.values():
        raise EngineFailed(
            f"it answers with weights {labels}, not those of now: it was started again, or serves another run"
        )
    ids = choice["token_ids"]
    versions: list[int] = []
    for span in sorted(choice["weight_versions"], key=lambda span: span["start"]):
        if span["start"] != len(versions) or not span["start"] <= span["end"] <= len(ids):
            raise EngineFailed("weight versions of other tokens than it sampled")
        versions += [cast(int, numbers[span["version"]])] * (span["end"] - span["start"])
    if len(versions) != len(ids):
        raise EngineFailed("weight versions of other tokens than it sampled")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise EngineFailed("ids that are no token's")
    steps = (choice["logprobs"] or {"content": []})["content"]
    if steps and [step["token_id"] for step in steps] != ids:
        raise EngineFailed("log-probs of other tokens than it sampled")
    return Response(ids, [step["logprob"] for step in steps], versions)
