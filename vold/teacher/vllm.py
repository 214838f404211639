"""The teacher in vLLM: log-probabilities of the student's responses, by vLLM's `prompt_logprobs`.

Remote engines (`vold serve teacher CONFIG`) score while the student's engines still sample; a colocated one, inside the
process, scores during the call of `submit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from vold.config.schema import OpenaiConfig, VllmConfig
from vold.io import log, visible
from vold.models.served import ServedModel
from vold.models.tokenizer import load_tokenizer
from vold.rollout.vllm.engines import ColocatedEngine, Engines, Request, load_sizes, settings_for_scoring
from vold.rollout.vllm.remote import RemoteEngines
from vold.teacher.openai_server import OpenaiServer
from vold.types import Prompt, Rollout

PROBE_TEXT = "One teacher, two ways to its log-probs: 1, 2, 3."
Scores = list[list[float] | None]
"""Teacher log-probs (nats) of the response ids of each rollout; None where the teacher failed."""

MAX_CONCURRENT_CALLS = 8
"""Calls of `submit` that wait for remote engines at the same time."""


class VllmTeacher:
    """Computes the log-probabilities of `Teacher` outside the trainer: over the tokenizer's ids, at the run's
    `temperature`.

    dtype: of a colocated engine; None: the checkpoint's. view: what it reads, see TeacherView. With remote engines
    (`settings.urls`) every rank opens a teacher, all at the same time."""

    def __init__(
        self,
        checkpoint: Path,
        settings: VllmConfig | OpenaiConfig,
        *,
        temperature: float,
        dtype: torch.dtype | None = None,
        view: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ):
        is_server = isinstance(settings, OpenaiConfig)
        self._images, self._view = None if is_server else load_sizes(checkpoint), view
        self._engines = open_scoring_engines(checkpoint, settings, temperature=temperature, dtype=dtype)
        self._pool: ThreadPoolExecutor | None = None
        if is_server or settings.urls:
            self._pool = ThreadPoolExecutor(max_workers=MAX_CONCURRENT_CALLS, thread_name_prefix="teacher")

    def scores(self, prompt: Prompt) -> bool:
        """Whether it scores responses to this prompt: a teacher without eyes scores none to an image."""
        return self._images is not None or not self._view(prompt).images

    def submit(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        """For each rollout the log-probability (nats) of each of its response ids, or None where scoring failed more
        often than `retries`: such a sample is to be masked, never filled in. The future raises ValueError when no
        engine is left."""
        for rollout in rollouts:
            if not self.scores(rollout.prompt):
                raise ValueError(
                    f"prompt {rollout.prompt.id} has images: a text-only teacher cannot score its responses"
                )
        requests = [Request.scoring(self._view(r.prompt), r.response_ids, self._images) for r in rollouts]
        prompts = [rollout.prompt for rollout in rollouts]
        if self._pool:
            return self._pool.submit(self._score, requests, prompts)
        done: Future[Scores] = Future()
        done.set_result(self._score(requests, prompts))
        return done

    def close(self) -> None:
        """Cancel calls that have not begun and wait for the others."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _score(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> Scores:
        answers = dict(self._engines.stream(requests))
        for index, prompt in enumerate(prompts):
            if answers[index] is None:
                warn_of_missing(prompt)
        in_order = (answers[index] for index in range(len(requests)))
        return [answer.scored if answer else None for answer in in_order]


def open_scoring_engines(
    checkpoint: Path,
    settings: VllmConfig | OpenaiConfig,
    *,
    temperature: float,
    dtype: torch.dtype | None,
    top_k: int = 0,
) -> Engines:
    """A teacher's engines: those of `settings.urls`, for every rank at the same time, one inside this process, or a
    server, which gives the `top_k` most probable ids too."""
    if isinstance(settings, OpenaiConfig):
        ids = load_tokenizer(checkpoint).encode(PROBE_TEXT, add_special_tokens=False)
        return OpenaiServer(settings, ids, top_k=top_k)
    if settings.urls:
        return RemoteEngines(checkpoint, settings, temperature=temperature)
    if dtype is None:
        dtype = ServedModel.from_pretrained(checkpoint).dtype
    settings = settings_for_scoring(checkpoint, settings)
    return ColocatedEngine(checkpoint, settings, dtype=dtype, temperature=temperature)


def warn_of_missing(prompt: Prompt) -> None:
    """Name a response that the teacher did not score, or whose scores were no numbers: it will be masked."""
    log.warning(f"the teacher did not score a response to prompt {visible(prompt.id)}: it is left out of the loss")
