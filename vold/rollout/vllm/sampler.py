"""The fast engine: vLLM, inside the training process (engines.py) or in other processes (remote.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from vold.config.schema import SamplingConfig
from vold.io import log
from vold.models.architecture import Architecture
from vold.models.images import ImageProcessor
from vold.rollout.sampling_vocabulary import SamplingVocabulary
from vold.rollout.vllm.engines import Engines, Request, sized_images
from vold.seeding import derive_seed
from vold.types import Prompt, Rollout, TokenIds

BANNED_BIAS = -100.0
"""Added to the logit of a banned id: vLLM's limit, e**-100 times as probable."""


class VllmSampler:
    """vLLM as a Sampler. Siblings share their prompt's keys and values (prefix cache)."""

    def __init__(self, checkpoint: Path, engines: Engines):
        self._engines = engines
        self._vocabulary = SamplingVocabulary.from_checkpoint(checkpoint)
        self.images = ImageProcessor(checkpoint) if Architecture.from_pretrained(checkpoint).vision else None
        self._version = 0

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """See Sampler. Response i of a prompt is sampled with the prompt's seed + i. `config.sequences_per_call` has no
        effect: the engine batches by itself. Raises ValueError when a prompt's responses were lost."""
        rollouts = dict(self._sample(prompts, config, responses, seed))
        lost = [prompt.id for index, prompt in enumerate(prompts) if not rollouts[index]]
        if lost:
            raise ValueError(
                f"the requests of {len(lost)} prompts failed too often (vllm.retries), see above: {', '.join(lost[:5])}"
            )
        return [rollout for index in range(len(prompts)) for rollout in rollouts[index]]

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[list[Rollout]]:
        """See Sampler. The same ids as from `sample`. A prompt whose request failed too often is named in a warning and
        left out, with all its responses."""
        for index, rollouts in self._sample(prompts, config, responses, seed, answered):
            if rollouts:
                yield rollouts
            else:
                log.warning(f"prompt {prompts[index].id} is left out: its request failed")

    def _sample(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """(index, responses) of each prompt as it finishes; no responses when its request was lost."""
        first_seed = derive_seed(seed, bits=62)
        sampled = responses if config.temperature > 0 else 1  # greedy siblings are equal, and vLLM refuses n > 1
        params = {
            "n": sampled,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "stop_token_ids": list(self._vocabulary.stop_ids),
            "logit_bias": dict.fromkeys(self._vocabulary.banned_ids, BANNED_BIAS),
            "logprobs": 0,
        }
        indices = [index for index, prompt in enumerate(prompts) if prompt.id not in answered]
        requests = [
            Request(
                prompts[index].token_ids.tolist(),
                sized_images(prompts[index], self.images),
                {**params, "seed": first_seed + index * responses},
            )
            for index in indices
        ]
        make_rollout, version = self._vocabulary.make_rollout, self._version
        for number, output in self._engines.stream(requests):
            index, outputs = indices[number], output.responses * (responses // sampled) if output else []
            yield index, [make_rollout(prompts[index], r.ids, r.logps, version=r.versions or version) for r in outputs]

    def score(self, prompt: Prompt, response_ids: TokenIds | Sequence[int]) -> list[float]:
        """See Sampler."""
        ((_, output),) = self._engines.stream([Request.scoring(prompt, response_ids, self.images)])
        if output is None:
            raise ValueError(f"the engines failed to score {prompt.id} (vllm.retries), see above")
        return output.scored

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler."""
        self._version += 1
        self._engines.load_weights(named_weights, self._version)
