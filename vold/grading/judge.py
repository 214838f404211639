"""A judge: a language model behind an OpenAI-compatible endpoint that scores responses.

Nothing is sent unless `reward.judge` is set, and then to that address alone: redirects are not followed. Scores are
cached on disk by the whole request, so that a resumed or repeated run asks each question once. A score that cannot be
had is a reason in words, never a number.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from vold.config.schema import JudgeConfig
from vold.io import append_jsonl, visible
from vold.jsonl import read_jsonl

Score = dict[str, float]
MAX_BYTES = 1 << 22  # of an answer
MAX_PAUSE = 30.0  # seconds between attempts
_RETRIED = (408, 409, 429)  # and 5xx
_REFUSED = (401, 403, 404, 405)  # whatever the response: key, model or address are wrong
PLACE = re.compile(r"\{(\w+)\}")


class _Attempt(Exception):
    """One attempt failed; the message is the reason. pause: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class Judge:
    """Asks for scores; use as a context manager. Threads may share it.

    folder    keeps account of the requests, and the answers where the config names no cache
    ranks     processes that share the budget
    counters  since construction: requests, cached (answers that needed none)
    Raises ValueError where the environment lacks the key.
    """

    def __init__(self, config: JudgeConfig, folder: Path, *, ranks: int = 1):
        self._config = config
        headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            if not (key := os.environ.get(config.api_key_env, "").strip()):
                raise ValueError(
                    f"reward.judge.api_key_env = {config.api_key_env}: the environment has no such variable; export it"
                )
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(
            timeout=config.seconds, headers=headers, follow_redirects=False, verify=config.url.startswith("https:")
        )
        self._threads = ThreadPoolExecutor(config.concurrency, "judge")
        self._lock = threading.Lock()
        self._asked: dict[str, Future] = {}  # requests that are under way, by their key
        name = f"{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}.jsonl"  # one writer for each file
        self._account, self._answers = folder / f"requests-{name}", (config.cache or folder) / f"answers-{name}"
        self._cache = _read_answers(self._answers.parent)
        spent = sum(len(read_jsonl(path)) for path in folder.glob("requests-*.jsonl"))
        self._allowance = None if config.budget is None else max(0, config.budget - spent) // ranks
        self._closed = threading.Event()
        self.counters = {"requests": 0, "cached": 0}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is under way."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def submit(self, row: Mapping[str, Any]) -> Future[Score | str]:
        """Begin to score a response (function_worker.SINGLE): {"score": value}, or the reason why there is none. The
        future raises ValueError where the endpoint would refuse every request. A truncated response has no end to
        judge, and the score 0."""
        if row["finish_reason"] == "length":
            return _finished({"score": 0.0})
        body = self._request(row)
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._cache:
                self.counters["cached"] += 1
                return _finished(self._score(self._cache[key]))
            if key not in self._asked:
                self._asked[key] = self._threads.submit(self._ask, key, body)
            return self._asked[key]

    def _request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = {"prompt": row["prompt"], "response": row["response_text"], "gold": row["gold"]}
        known = {**{name: str(value) for name, value in row["metadata"].items()}, **texts}
        # in one pass: what is put in may hold braces of its own
        content = PLACE.sub(lambda match: known.get(match[1], match[0]), self._config.template)
        messages = [{"role": "system", "content": self._config.system}] if self._config.system else []
        sampling = {"temperature": self._config.temperature, "max_tokens": self._config.max_tokens}
        messages.append({"role": "user", "content": content})
        fields = {"model": self._config.model, "messages": messages, **sampling, **self._config.body}
        return {name: value for name, value in fields.items() if value is not None}

    def _ask(self, key: str, body: dict[str, Any]) -> Score | str:
        reason = ""
        for attempt in range(self._config.retries + 1):
            with self._lock:
                if self._allowance is not None and self.counters["requests"] >= self._allowance:
                    self._asked.pop(key, None)
                    return f"reward.judge.budget = {self._config.budget} requests is spent"
                self.counters["requests"] += 1
                _append(self._account, {"key": key})
            try:
                text = self._post(body)
            except _Attempt as error:
                reason = str(error)
                pause = min(2.0**attempt * (0.5 + random.random() / 2), MAX_PAUSE)
                if attempt < self._config.retries and self._closed.wait(min(error.pause or pause, MAX_PAUSE)):
                    break
                continue
            with self._lock:
                self._cache[key] = text
                _append(self._answers, {"key": key, "answer": text})
                self._asked.pop(key, None)
            return self._score(text)
        with self._lock:
            self._asked.pop(key, None)
        return f"no answer in {self._config.retries + 1} attempts: {reason}"

    def _post(self, body: dict[str, Any]) -> str:
        """The judge's answer. Raises _Attempt where another attempt may succeed, ValueError where none can."""
        url, deadline = f"{self._config.url.rstrip('/')}/chat/completions", time.monotonic() + self._config.seconds
        content = bytearray()
        try:
            with self._client.stream("POST", url, content=json.dumps(body).encode()) as reply:
                for part in reply.iter_bytes():
                    content += part
                    if len(content) > MAX_BYTES or time.monotonic() > deadline:
                        raise _Attempt(f"an answer of more than {self._config.seconds:g} s or {MAX_BYTES} bytes")
        except (httpx2.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed
            raise _Attempt(str(error) or type(error).__name__) from None
        status = reply.status_code
        shown = visible(" ".join(bytes(content[:2000]).decode(errors="replace").split()))[:200]
        if status in _REFUSED or 300 <= status < 400:
            raise ValueError(
                f"reward.judge: {url} answers HTTP {status}: {shown}; look at reward.judge.url, model and api_key_env"
            )
        if status >= 500 or status in _RETRIED:
            raise _Attempt(f"HTTP {status}: {shown}", _seconds(reply.headers.get("retry-after")))
        if status >= 400:
            return _refusal(f"HTTP {status}: {shown}")
        try:
            answer = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Attempt(f"an answer that is no chat completion: {shown}") from None
        return answer if isinstance(answer, str) else ""

    def _score(self, text: str) -> Score | str:
        """What the pattern finds in the judge's answer, as a number."""
        if text.startswith(_REFUSAL):
            return text.removeprefix(_REFUSAL)
        config, found = self._config, re.findall(self._config.pattern, text)
        if not found:
            return f"no score (reward.judge.pattern) in the answer {visible(' '.join(text.split()))[-80:]!r}"
        word = found[-1].strip()
        for name, value in config.scores.items():
            if word.casefold() == name.casefold():
                return {"score": value}
        try:
            number = float(word)
        except ValueError:
            return f"{visible(word)[:40]!r} is neither a number nor one of reward.judge.scores"
        if not config.lowest <= number <= config.highest:
            return f"the score {word[:40]} lies outside [{config.lowest:g}, {config.highest:g}]"
        return {"score": (number - config.lowest) / (config.highest - config.lowest)}


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, [row])


_REFUSAL = "\0"  # begins a cached answer of the endpoint, not of the model


def _refusal(reason: str) -> str:
    return _REFUSAL + reason


def _finished(value: Score | str) -> Future[Score | str]:
    future: Future[Score | str] = Future()
    future.set_result(value)
    return future


def _read_answers(folder: Path) -> dict[str, str]:
    """Answers by the key of their request. A killed run may leave half a line."""
    rows = [
        row
        for path in sorted(folder.glob("answers-*.jsonl"))
        for row in read_jsonl(path, lambda row: isinstance(row.get("key"), str) and isinstance(row.get("answer"), str))
    ]
    return {row["key"]: row["answer"] for row in rows}


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
