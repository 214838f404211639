"""What is said to a `vold serve` engine over HTTP, and which of its answers count."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vold.data.pictures import read_picture
from vold.rollout.vllm.engines import Answer, Request, Response, scored_logps


class EngineFailed(Exception):
    """One line: what an engine did instead of answering."""


class Calls:
    """Requests under way that whoever asked may no longer want."""

    def __init__(self):
        self.broken_off = False
        self._open: set[HTTPConnection] = set()

    def break_off(self) -> None:
        """Hang up: vLLM aborts what it does for a client that is gone."""
        self.broken_off = True
        for connection in list(self._open):
            if connection.sock:
                with suppress(OSError):  # answered in this moment
                    connection.sock.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def keep(self, connection: HTTPConnection) -> Iterator[None]:
        self._open.add(connection)
        try:
            yield
        finally:
            self._open.discard(connection)


def generate(url: str, request: Request, label: str, timeout: float, calls: Calls | None = None) -> Answer:
    """Raises EngineFailed for anything but a complete answer by the weights called `label`."""
    body = {"token_ids": request.token_ids, "sampling_params": {**request.params, "detokenize": False}}
    if request.images:
        body["content_parts"] = [{"type": "image_url", "url": _data_url(path)} for path in request.images]
    found = post(url, "/inference/v1/generate", body, timeout, calls)
    try:
        answer = Answer(
            [_response(choice, label) for choice in found["choices"]],
            scored_logps(request, [_scores(step) for step in found["prompt_logprobs"] or []]),
        )
        numbers = chain(answer.scored, *(response.logps for response in answer.responses))
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a log-prob that is no number")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise EngineFailed(f"nonsense ({type(error).__name__}: {error})") from None
    expected = request.params.get("n", 1)
    if len(answer.responses) != expected:
        raise EngineFailed(f"{len(answer.responses)} responses where {expected} were asked for")
    return answer


def call_workers(url: str, method: str, arguments: list, timeout: float) -> None:
    """A method of PolicyWorker, in the engine's process."""
    post(url, "/collective_rpc", {"method": method, "args": arguments}, timeout)


def post(url: str, path: str, body: dict[str, Any], timeout: float, calls: Calls | None = None) -> dict[str, Any]:
    return _send("POST", url, path, json.dumps(body), timeout, calls or Calls())


def get(url: str, path: str, timeout: float = 10.0) -> dict[str, Any]:
    return _send("GET", url, path, None, timeout, Calls())


def _send(method: str, url: str, path: str, body: str | None, timeout: float, calls: Calls) -> dict[str, Any]:
    """The JSON object it answers. Raises EngineFailed for whatever else happens; ValueError when the question is wrong,
    whoever is asked."""
    where = urlsplit(url)
    connection = (HTTPSConnection if where.scheme == "https" else HTTPConnection)(where.netloc, timeout=timeout)
    try:
        with calls.keep(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read()
    except (OSError, HTTPException) as error:  # refused, reset, timed out, half an answer
        raise EngineFailed(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if reply.status >= 400:
        reason = f"HTTP {reply.status}: {_one_line(text)}"
        if reply.status < 500:
            raise ValueError(f"{url}{path}: {reason}; is it an engine of `vold serve`?")
        raise EngineFailed(reason)
    try:
        answer = json.loads(text or b"{}")
    except ValueError:
        raise EngineFailed(f"an answer that is not JSON: {_one_line(text)}") from None
    return answer if isinstance(answer, dict) else {"": answer}


def _one_line(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:200]


def _data_url(path: Path) -> str:
    """The pixels that the trainer sees, not the file: the server would read transparency and 16 bits in its own way."""
    png = io.BytesIO()
    read_picture(path).save(png, "PNG", compress_level=1)
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
