"""Requests to an OpenAI-compatible endpoint that somebody named in the config: to that address alone, bounded in time
and bytes, repeated where another attempt may succeed."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx2

from vold.io import visible

MAX_PAUSE = 30.0  # seconds between attempts
_RETRIED = (408, 409, 429)  # and 5xx
_REFUSED = (401, 403, 404, 405)  # whatever is asked: key, model or address are wrong
T = TypeVar("T")


class Settings(Protocol):
    """Keys of a config section that names an endpoint."""

    url: str
    api_key_env: str | None
    seconds: float
    retries: int


class AttemptFailed(Exception):
    """The message is the reason. pause: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class Reply:
    """status: below 500. shown: the beginning of the answer, made visible."""

    status: int
    content: bytes
    shown: str

    def choice(self) -> Mapping[str, Any]:
        """The completion's first choice. Raises AttemptFailed where the answer is none."""
        try:
            return dict(json.loads(self.content)["choices"][0])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise AttemptFailed(f"an answer that is no completion: {self.shown}") from None


class Endpoint:
    """section: name of the settings in messages. max_bytes: of an answer. Redirects are not followed, and a plain-http
    address, one's own network, is reached without the environment's proxies. Threads may share it.
    Raises ValueError where the environment lacks the key."""

    def __init__(self, section: str, settings: Settings, max_bytes: int):
        self._section, self._settings, self._max_bytes = section, settings, max_bytes
        headers = {"Content-Type": "application/json"}
        if settings.api_key_env is not None:
            if not (key := os.environ.get(settings.api_key_env, "").strip()):
                raise ValueError(
                    f"{section}.api_key_env = {settings.api_key_env}: the environment has no such variable; export it"
                )
            headers["Authorization"] = f"Bearer {key}"
        https = settings.url.startswith("https:")
        self._client = httpx2.Client(
            timeout=settings.seconds, headers=headers, follow_redirects=False, verify=https, trust_env=https
        )
        self._closed = threading.Event()

    def close(self) -> None:
        """Give up what is under way."""
        self._closed.set()
        self._client.close()

    def retry(self, attempt: Callable[[], T]) -> T:
        """`attempt` until it raises no AttemptFailed, with longer and longer pauses, at most `retries` times more.
        Raises the last AttemptFailed's reason as one."""
        reason = ""
        for tries in range(self._settings.retries + 1):
            try:
                return attempt()
            except AttemptFailed as error:
                reason = str(error)
                pause = min(error.pause or 2.0**tries * (0.5 + random.random() / 2), MAX_PAUSE)
                if tries < self._settings.retries and self._closed.wait(pause):
                    break
        raise AttemptFailed(f"no answer in {self._settings.retries + 1} attempts: {reason}")

    def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Raises AttemptFailed where another attempt may succeed, ValueError where none can, whatever is asked."""
        url, content = f"{self._settings.url.rstrip('/')}/{path}", bytearray()
        seconds, deadline = self._settings.seconds, time.monotonic() + self._settings.seconds
        try:
            with self._client.stream("POST", url, content=json.dumps(body).encode()) as answer:
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > self._max_bytes or time.monotonic() > deadline:
                        raise AttemptFailed(f"an answer of more than {seconds:g} s or {self._max_bytes} bytes")
        except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the client was closed
            raise AttemptFailed(visible(str(error)) or type(error).__name__) from None
        status = answer.status_code
        shown = visible(" ".join(bytes(content[:2000]).decode(errors="replace").split()))[:200]
        if status in _REFUSED or 300 <= status < 400:
            keys = f"{self._section}.url, model and api_key_env"
            raise ValueError(f"{self._section}: {url} answers HTTP {status}: {shown}; look at {keys}")
        if status >= 500 or status in _RETRIED:
            raise AttemptFailed(f"HTTP {status}: {shown}", _seconds(answer.headers.get("retry-after")))
        return Reply(status, bytes(content), shown)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
