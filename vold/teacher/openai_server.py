"""A teacher behind any OpenAI-compatible server that returns the log-probs of a prompt's tokens, named by token id:
vLLM's `prompt_logprobs`, or `echo` with `logprobs` and `return_tokens_as_token_ids`. Answers that name tokens by their
text are refused: two ids may have one text. Text alone is sent, as token ids; no image goes anywhere.

n scored tokens of a response, k ids of the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vold.config.schema import OpenaiConfig
from vold.endpoint import AttemptFailed, Endpoint
from vold.io import log
from vold.rollout.vllm.engines import EngineOutput, Request

MAX_BYTES = 1 << 28  # of an answer: 32768 positions with 100 ids each take some 150 MB
Step = dict[int, float]
"""Token id -> log-prob at one position."""


class OpenaiServer:
    """The Engines of a teacher behind `settings.url`; it has no weights of ours. top_k: ids that `stream` returns
    beside the log-prob of each scored token. Raises ValueError where the environment lacks the key, or the server does
    not give such log-probs (`probe_ids`: token ids that it is asked about)."""

    def __init__(self, settings: OpenaiConfig, probe_ids: Sequence[int], *, top_k: int = 0):
        self._settings, self._top_k = settings, top_k
        self._endpoint = Endpoint("openai", settings, MAX_BYTES)
        self._body = self._choose_dialect(list(probe_ids))

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, EngineOutput | None]]:
        """See Engines. Raises ValueError where the server refuses a request, so that it would refuse all."""
        with ThreadPoolExecutor(self._settings.concurrency, "openai-teacher") as threads:
            indices = {threads.submit(self._output, request): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(indices):
                    yield indices[future], future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("a teacher's weights do not change")

    def _choose_dialect(self, ids: list[int]) -> dict[str, Any]:
        """The fields by which this server gives log-probs of a prompt's ids."""
        dialects: tuple[dict[str, Any], ...] = (
            {"prompt_logprobs": max(self._top_k, 1)},
            {"echo": True, "logprobs": max(self._top_k, 1), "return_tokens_as_token_ids": True},
        )
        reasons = []
        for dialect in dialects:
            try:
                steps = _steps(self._post(ids, dialect), len(ids))
                _check_aligned(steps, ids)
            except (AttemptFailed, ValueError) as error:
                reasons.append(str(error))
                continue
            if self._top_k and len(steps[-1]) < self._top_k:
                reasons.append(f"{len(steps[-1])} ids a token where {self._top_k} were asked for")
                continue
            return dialect
        raise ValueError(
            f"openai.url = {self._settings.url} gives no log-probs of a prompt's token ids: {' / '.join(reasons)}; "
            "use a vLLM server (vllm serve --max-logprobs K), or another teacher engine"
        )

    def _output(self, request: Request) -> EngineOutput | None:
        """None after `retries` further attempts."""
        if request.images:
            raise ValueError("a teacher with engine = 'openai' reads text only: it gets token ids")
        ids = request.token_ids
        try:
            return self._endpoint.retry(lambda: self._scored(request, _steps(self._post(ids, self._body), len(ids))))
        except AttemptFailed as error:
            log.warning(f"openai.url = {self._settings.url}: no log-probs: {error}")
            return None

    def _scored(self, request: Request, steps: list[Step]) -> EngineOutput:
        scored, ids = steps[len(steps) - request.scored :], request.token_ids[-request.scored :]
        _check_aligned(scored, ids)
        output = EngineOutput([], [step[id] for step, id in zip(scored, ids, strict=True)])
        if not all(map(math.isfinite, output.scored)):
            raise AttemptFailed("a log-prob that is no number")
        return replace(output, top=_top(scored, self._top_k)) if self._top_k else output

    def _post(self, ids: list[int], fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer's first choice. Raises AttemptFailed where another attempt may succeed, ValueError where none
        can: a request that this server refuses is like all others."""
        body = {"model": self._settings.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, **fields}
        reply = self._endpoint.post("completions", body)
        if reply.status >= 400:
            raise ValueError(f"openai.url = {self._settings.url} answers HTTP {reply.status}: {reply.shown}")
        return reply.choice()


def _steps(choice: Mapping[str, Any], count: int) -> list[Step]:
    """The log-probs at each of the prompt's `count` ids. Raises AttemptFailed for anything else."""
    try:
        found = choice.get("prompt_logprobs")
        if found is not None:
            steps = [{int(id): float(entry["logprob"]) for id, entry in (step or {}).items()} for step in found]
        else:
            steps = _echoed(choice["logprobs"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise AttemptFailed("no log-probs by token id in the answer") from None
    if len(steps) < count:
        raise AttemptFailed(f"log-probs of {len(steps)} tokens where {count} were sent")
    return steps[:count]


def _echoed(logprobs: Mapping[str, Any]) -> list[Step]:
    """From `tokens`, `token_logprobs` and `top_logprobs` whose tokens are called token_id:N."""
    steps = []
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    for token, logp, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True):
        step = {_id(name): float(value) for name, value in (top or {}).items()}
        steps.append(step if logp is None else {_id(token): float(logp), **step})
    return steps


def _id(name: str) -> int:
    prefix, _, number = name.partition(":")
    if prefix != "token_id":
        raise ValueError(f"token {name[:20]!r} has no id")
    return int(number)


def _check_aligned(steps: Sequence[Step], ids: Sequence[int]) -> None:
    """The first token of a prompt has no log-prob."""
    pairs = list(zip(steps, ids, strict=True))
    if any(id not in step for step, id in pairs[0 if pairs and pairs[0][0] else 1 :]):
        raise AttemptFailed("log-probs of other tokens than were sent")


def _top(steps: Sequence[Step], k: int) -> tuple[Tensor, Tensor]:
    """ids [n, k] and log-probs [n, k] of each position's k most probable ids."""
    rows = [sorted(step.items(), key=lambda pair: (-pair[1], pair[0]))[:k] for step in steps]
    if any(len(row) < k for row in rows):
        raise AttemptFailed(f"fewer than {k} ids at a token")
    ids = torch.tensor([[id for id, _ in row] for row in rows], dtype=torch.int64).view(-1, k)
    logps = torch.tensor([[logp for _, logp in row] for row in rows], dtype=torch.float32).view(-1, k)
    if not logps.isfinite().all():
        raise AttemptFailed("a log-prob that is no number")
    return ids, logps
