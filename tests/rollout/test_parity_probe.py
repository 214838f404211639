"""The parity probe after a weight sync."""

from __future__ import annotations

import pytest
import torch

from vold.data.packing import encode_text


def test_stale_weights_raise_the_alarm(world, layout):
    """A sampler that missed an update is found out; one that got it is not."""
    from support.steps import OPTIMIZER, assign_token_weights, batch_of, make_groups
    from vold.rollout import ParityProbe, TransformersSampler
    from vold.trainer.trainer import Trainer

    sampler = TransformersSampler(world.student, dtype=torch.float32, device=torch.device("cpu"))
    numbers = dict(steps=5, dtype=torch.float32, vocab_size=54)
    trainer = Trainer(world.student, layout, OPTIMIZER.model_copy(update={"lr": 0.05}), **numbers)
    groups = make_groups([[1.0, 0.0, 0.0]])
    rollout = groups[0].rollouts[0]
    probe = ParityProbe([(rollout.prompt, rollout.response_ids)], encode_text, 1.05)
    assert probe.check(sampler, trainer.logprobs)["parity_max"] < 1e-4
    trainer.step(batch_of(assign_token_weights("grpo", groups)))
    with pytest.raises(ValueError, match=r"disagree after a weight sync.*parity_limit = 1.05"):
        probe.check(sampler, trainer.logprobs)
    sampler.load_weights(trainer.weights())
    assert probe.check(sampler, trainer.logprobs)["parity_max"] < 1e-4


def test_weights_that_overflowed_are_divergence(world):
    from support.steps import make_groups
    from vold.rollout import ParityProbe, TransformersSampler
    from vold.types import Diverged

    sampler = TransformersSampler(world.student, dtype=torch.float32, device=torch.device("cpu"))
    rollout = make_groups([[1.0, 0.0, 0.0]])[0].rollouts[0]
    probe = ParityProbe([(rollout.prompt, rollout.response_ids)], encode_text, 1.05)
    overflowed = [float("nan")] * len(rollout.response_ids)
    with pytest.raises(Diverged, match="the trainer's log-probs are NaN or infinite"):
        probe.check(sampler, lambda batch: {0: overflowed})
