"""HTTP requests to a `vold serve` engine, and the checks that an answer must pass."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import httpx2

from vold.rollout.vllm.engines import EngineOutput, Request, Response, SizedImage, scored_logps

# One connection a request: an engine that was started again meets no connection of its predecessor's.
_client = httpx2.Client(limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0), trust_env=False)


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
        if event == "connection.connect_tcp.complete":
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self.cancelled:
                self.cancel()


def generate(
    url: str, request: Request, label: str, timeout: float, cancellation: Cancellation | None = None
) -> EngineOutput:
    """The engine's output for one request. Raises EngineFailed for anything but a complete answer by the weights whose
    version is called `label`."""
    body = {"token_ids": request.token_ids, "sampling_params": {**request.params, "detokenize": False}}
    if request.images:
        body["content_parts"] = [{"type": "image_url", "url": _data_url(image)} for image in request.images]
    answer = post(url, "/inference/v1/generate", body, timeout, cancellation)
    try:
        output = EngineOutput(
            [_response(choice, label) for choice in answer["choices"]],
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
    return output


def call_workers(url: str, method: str, arguments: list, timeout: float) -> None:
    """Call a method of PolicyWorker in the engine's process."""
    post(url, "/collective_rpc", {"method": method, "args": arguments}, timeout)


def post(
    url: str, path: str, body: dict[str, Any], timeout: float, cancellation: Cancellation | None = None
) -> dict[str, Any]:
    """The JSON object that answers a POST. Raises EngineFailed for whatever else happens; ValueError where the request
    is wrong, so that every engine would refuse it."""
    return _send("POST", url, path, body, timeout, cancellation)


def get(url: str, path: str, timeout: float = 10.0) -> dict[str, Any]:
    """The JSON object that answers a GET; errors as in `post`."""
    return _send("GET", url, path, None, timeout, None)


def _send(
    method: str, url: str, path: str, body: dict | None, timeout: float, cancellation: Cancellation | None
) -> dict[str, Any]:
    extensions = {"trace": cancellation.trace} if cancellation else {}
    try:
        reply = _client.request(method, f"{url}{path}", json=body, timeout=timeout, extensions=extensions)
    except httpx2.HTTPError as error:  # refused, reset, timed out, half an answer
        raise EngineFailed(str(error) or type(error).__name__) from None
    if reply.status_code >= 400:
        reason = f"HTTP {reply.status_code}: {_one_line(reply.content)}"
        if reply.status_code < 500:
            raise ValueError(f"{url}{path}: {reason}; is it an engine of `vold serve`?")
        raise EngineFailed(reason)
    try:
        answer = json.loads(reply.content or b"{}")
    except ValueError:
        raise EngineFailed(f"an answer that is not JSON: {_one_line(reply.content)}") from None
    return answer if isinstance(answer, dict) else {"": answer}


def _one_line(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:200]


def _data_url(image: SizedImage) -> str:
    """The pixels as a PNG, as the trainer reads them: the server would decode transparency and 16 bits differently from
    the file, and resize differently."""
    png = io.BytesIO()
    image.read().save(png, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _scores(step: dict[str, Any] | None) -> dict[int, float]:
    return {int(token): entry["logprob"] for token, entry in (step or {}).items()}


def _response(choice: dict[str, Any], label: str) -> Response:
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
