"""The fixed sequences of the parity probe: the first training prompt, and the first evaluation prompt with an image."""

from __future__ import annotations

from collections.abc import Sequence

from vold.config.schema import RlConfig, SamplingConfig
from vold.models.images import image_encoder
from vold.records import Prompt
from vold.rollout import ParityProbe, TransformersSampler
from vold.stages.evaluate import Evaluator

PROBE_TOKENS = 16


def build_probe(
    config: RlConfig, prompts: Sequence[Prompt], evaluator: Evaluator, sampler: TransformersSampler
) -> ParityProbe:
    """Responses are the starting student's own greedy ones."""
    seen = [prompt for found in evaluator.prompts.values() for prompt in found if prompt.images]
    chosen = [prompts[0], *seen[:1]]
    greedy = SamplingConfig(max_new_tokens=PROBE_TOKENS, temperature=0.0)
    rollouts = sampler.sample(chosen, greedy, responses=1, seed=0)
    sequences = [(rollout.prompt, rollout.response_ids) for rollout in rollouts]
    return ParityProbe(sequences, image_encoder(sampler.images), config.rollout.alarm_error)
