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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vold.config.schema import JudgeConfig
from vold.endpoint import AttemptFailed, Endpoint
from vold.io import append_jsonl, visible
from vold.jsonl import read_jsonl

Score = dict[str, float]
MAX_BYTES = 1 << 22  # of an answer
PLACE = re.compile(r"\{(\w+)\}")


class Judge:
    """Asks for scores; use as a context manager. Threads may share it.

    folder    keeps account of the requests, and the answers where the config names no cache
    ranks     processes that share the budget
    counters  since construction: requests, cached (answers that needed none)
    Raises ValueError where the environment lacks the key.
    """

    def __init__(self, config: JudgeConfig, folder: Path, *, ranks: int = 1):
        self._config = config
        self._endpoint = Endpoint("reward.judge", config, MAX_BYTES)
        self._threads = ThreadPoolExecutor(config.concurrency, "judge")
        self._lock = threading.Lock()
        self._asked: dict[str, Future] = {}  # requests that are under way, by their key
        name = f"{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}.jsonl"  # one writer for each file
        self._account, self._answers = folder / f"requests-{name}", (config.cache or folder) / f"answers-{name}"
        self._cache = _read_answers(self._answers.parent)
        spent = sum(len(read_jsonl(path)) for path in folder.glob("requests-*.jsonl"))
        self._allowance = None if config.budget is None else max(0, config.budget - spent) // ranks
        self.counters = {"requests": 0, "cached": 0}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._endpoint.close()

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
        try:
            answer = self._endpoint.retry(lambda: self._attempt(key, body))
        except AttemptFailed as error:
            with self._lock:
                self._asked.pop(key, None)
            return str(error)
        with self._lock:
            self._asked.pop(key, None)
            if answer is None:
                return f"reward.judge.budget = {self._config.budget} requests is spent"
            self._cache[key] = answer
            _append(self._answers, {"key": key, "answer": answer})
        return self._score(answer)

    def _attempt(self, key: str, body: dict[str, Any]) -> str | None:
        """The judge's answer, or the endpoint's refusal of this request; None where the budget is spent."""
        with self._lock:
            if self._allowance is not None and self.counters["requests"] >= self._allowance:
                return None
            self.counters["requests"] += 1
            _append(self._account, {"key": key})
        reply = self._endpoint.post("chat/completions", body)
        if reply.status >= 400:
            return f"{_REFUSAL}HTTP {reply.status}: {reply.shown}"
        message = reply.choice().get("message")
        if not isinstance(message, Mapping) or "content" not in message:
            raise AttemptFailed(f"an answer that is no chat completion: {reply.shown}")
        return message["content"] if isinstance(message["content"], str) else ""

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
