"""The fixed sequences of the parity probe: a training prompt, and the first evaluation prompt with an image."""

from __future__ import annotations

from vold.config.schema import SamplingConfig
from vold.evaluation.evaluator import Evaluator
from vold.models.images import prompt_encoder
from vold.rollout import ParityProbe, Sampler
from vold.types import Prompt

PROBE_TOKENS = 16


def build_probe(prompt: Prompt, evaluator: Evaluator, sampler: Sampler, *, parity_limit: float) -> ParityProbe:
    """A parity probe whose responses are the starting student's own greedy ones."""
    with_images = [prompt for prompts in evaluator.prompts.values() for prompt in prompts if prompt.images]
    greedy = SamplingConfig(max_new_tokens=PROBE_TOKENS, temperature=0.0)
    rollouts = sampler.sample([prompt, *with_images[:1]], greedy, responses=1, seed=0)
    sequences = [(rollout.prompt, rollout.response_ids) for rollout in rollouts]
    return ParityProbe(sequences, prompt_encoder(sampler.images), parity_limit)
