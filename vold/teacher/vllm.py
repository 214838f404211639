"""The teacher as a vLLM engine: log-probabilities of responses that the student has drawn, by vLLM's `prompt_logprobs`.

Engines of its own (`vold serve teacher CONFIG`) score while the student's still draw; one inside the process scores
when it is asked, and nothing else meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoConfig

from vold.config.schema import VllmConfig
from vold.models.architecture import Architecture
from vold.rollout.vllm.engines import ColocatedEngine, Engines, Request, settings_for_scoring
from vold.rollout.vllm.remote import RemoteEngines
from vold.types import Rollout

Scores = list[list[float] | None]

AT_ONCE = 8
"""Calls of `submit` that wait for engines of their own side by side."""


class VllmTeacher:
    """The same numbers as `Teacher`, outside the trainer: over the tokenizer's own ids, at the run's `temperature`.

    `dtype`: of an engine inside the process; the checkpoint's own when None. Where `settings.urls` names engines, every
    rank opens a teacher, and all at the same time.
    """

    def __init__(self, checkpoint: Path, settings: VllmConfig, *, temperature: float, dtype: torch.dtype | None = None):
        self._reads_images = Architecture.from_pretrained(checkpoint).vision is not None
        self._engines: Engines
        self._pool: ThreadPoolExecutor | None = None
        if settings.urls:
            self._engines = RemoteEngines(checkpoint, settings, temperature=temperature)
            self._pool = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="teacher")
        else:
            dtype = dtype or AutoConfig.from_pretrained(checkpoint, local_files_only=True).dtype
            settings = settings_for_scoring(checkpoint, settings)
            self._engines = ColocatedEngine(checkpoint, settings, dtype=dtype, temperature=temperature)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        """For each rollout the log-probability (nats) of each of its response ids, or None where scoring failed more
        often than `retries`: such a sample is to be masked, never filled in. The future raises ValueError when no
        engine is left."""
        for rollout in rollouts:
            if rollout.prompt.images and not self._reads_images:
                raise ValueError(
                    f"prompt {rollout.prompt.id} has images: a text-only teacher cannot score its responses"
                )
        requests = [Request.scoring(rollout.prompt, rollout.response_ids) for rollout in rollouts]
        if self._pool:
            return self._pool.submit(self._score, requests)
        done: Future[Scores] = Future()
        done.set_result(self._score(requests))
        return done

    def close(self) -> None:
        """Drops what has not begun and waits for the rest."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _score(self, requests: Sequence[Request]) -> Scores:
        answers = dict(self._engines.stream(requests))
        return [answers[place].scored if answers[place] else None for place in range(len(requests))]
