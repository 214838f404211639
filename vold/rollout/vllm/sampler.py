"""The fast engine: vLLM, inside the training process or in processes of its own (vllm_engines.py)."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vold.config.schema import SamplingConfig
from vold.models.architecture import Architecture
from vold.models.images import ImageProcessor
from vold.rollout.vllm.engines import Engines, Request
from vold.rollout.vocabulary import Vocabulary
from vold.types import Prompt, Rollout

BANNED = -100.0
"""Added to a logit, vLLM's limit: e**-100 times as probable."""


class VllmSampler:
    """See Sampler. Token ids go in and come out; siblings share their prompt's keys and values (prefix cache)."""

    def __init__(self, checkpoint: Path, engines: Engines):
        self._engines = engines
        self._vocabulary = Vocabulary.of(checkpoint)
        self.images = ImageProcessor(checkpoint) if Architecture.from_pretrained(checkpoint).vision else None
        self._version = 0

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """See Sampler. Sample i of a prompt draws with the prompt's seed + i; `config.sequences_per_call` does not
        matter here, the engine batches as it has room. Raises ValueError when a prompt's responses were lost."""
        found = dict(self._draw(prompts, config, responses, seed))
        lost = [prompt.id for place, prompt in enumerate(prompts) if not found[place]]
        if lost:
            raise ValueError(
                f"the requests of {len(lost)} prompts failed too often (vllm.retries), see above: {', '.join(lost[:5])}"
            )
        return [rollout for place in range(len(prompts)) for rollout in found[place]]

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[list[Rollout]]:
        """See Sampler. The same ids as `sample` draws. A prompt whose request failed too often is named and left out,
        with all its responses."""
        for place, rollouts in self._draw(prompts, config, responses, seed, answered):
            if rollouts:
                yield rollouts
            else:
                print(f"vold: prompt {prompts[place].id} is left out: its request failed", file=sys.stderr, flush=True)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """(place, its responses) of each prompt as it finishes; no responses when its request was lost."""
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
        places = [place for place, prompt in enumerate(prompts) if prompt.id not in answered]
        requests = [
            Request(prompt.token_ids.tolist(), prompt.images, {**params, "seed": first + place * responses})
            for place, prompt in enumerate(prompts)
            if prompt.id not in answered
        ]
        version = self._version
        for number, answer in self._engines.stream(requests):
            found, place = answer.responses * (responses // drawn) if answer else [], places[number]
            yield place, [self._vocabulary.rollout(prompts[place], r.ids, r.logps, version=version) for r in found]

    def score(self, prompt: Prompt, response_ids: Sequence[int]) -> list[float]:
        """See Sampler."""
        ((_, answer),) = self._engines.stream([Request.scoring(prompt, response_ids)])
        if answer is None:
            raise ValueError(f"the engines failed to score {prompt.id} (vllm.retries), see above")
        return answer.scored

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler."""
        self._version += 1
        self._engines.load_weights(named_weights, self._version)
