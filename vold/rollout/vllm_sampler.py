"""The fast engine: vLLM, inside the training process or in processes of its own (vllm_engines.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vold.config.schema import SamplingConfig
from vold.models.architecture import Architecture
from vold.models.images import ImageReader
from vold.records import Prompt, Rollout
from vold.rollout.vllm_engines import Engines, Request
from vold.rollout.vocabulary import Vocabulary

BANNED = -100.0
"""Added to a logit, vLLM's limit: e**-100 times as probable."""


class VllmSampler:
    """See Sampler. Token ids go in and come out; siblings share their prompt's keys and values (prefix cache)."""

    def __init__(self, checkpoint: Path, engines: Engines):
        self._engines = engines
        self._vocabulary = Vocabulary.of(checkpoint)
        self.images = ImageReader(checkpoint) if Architecture.from_pretrained(checkpoint).vision else None
        self._version = 0

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """See Sampler. Sample i of a prompt draws with the prompt's seed + i; `config.sequences_per_call` does not
        matter here, the engine batches as it has room."""
        first = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 2)
        drawn = responses if config.temperature > 0 else 1  # greedy siblings are equal, and vLLM refuses to draw them
        params = {
            "n": drawn,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "stop_token_ids": list(self._vocabulary.stop),
            "logit_bias": dict.fromkeys(self._vocabulary.banned, BANNED),
            "logprobs": 0,
        }
        requests = [
            Request(prompt.token_ids, prompt.images, {**params, "seed": first + place * responses})
            for place, prompt in enumerate(prompts)
        ]
        return [
            self._vocabulary.rollout(prompt, response.ids, response.logps, version=self._version)
            for prompt, answer in zip(prompts, self._engines.generate(requests), strict=True)
            for response in answer.responses * (responses // drawn)
        ]

    def score(self, prompt: Prompt, response_ids: Sequence[int]) -> list[float]:
        """See Sampler."""
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        request = Request((*prompt.token_ids, *response_ids), prompt.images, params)
        return self._engines.generate([request])[0].prompt_logps[-len(response_ids) :]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler."""
        self._version += 1
        self._engines.load_weights(named_weights, self._version)
