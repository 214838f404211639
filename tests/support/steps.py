"""Shared by the trainer's tests: samples of unequal length, a trainer and a teacher on the tiny checkpoints."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from vold.config.schema import AdapterConfig, ObjectiveConfig, OptimizerConfig
from vold.data.packing import filler, pack
from vold.objectives import Objective, build_objective
from vold.teacher import Teacher
from vold.trainer.trainer import Trainer
from vold.types import Batch, Group, Prompt, Rollout, Sample, Verdict

VOCAB_SIZE = 40  # ids used by the samples stay below
LONGEST = 13  # tokens of a response
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="constant", warmup_steps=0)


def make_trainer(
    student: Path,
    layout,
    *,
    steps: int = 10,
    objective=Objective(),
    dtype=torch.float32,
    importance_cap: float | None = None,
    adapter: AdapterConfig | None = None,
    train=None,
    terms=(),
    **numbers,
) -> Trainer:
    return Trainer(
        student,
        layout,
        OPTIMIZER.model_copy(update=numbers),
        steps=steps,
        dtype=dtype,
        vocab_size=VOCAB_SIZE,
        objective=objective,
        importance_cap=importance_cap,
        adapter=adapter,
        train=train,
        terms=terms,
    )


def make_teacher(checkpoint: Path, layout, dtype=torch.float32, full_distributions: bool = False) -> Teacher:
    return Teacher(checkpoint, layout, dtype=dtype, vocab_size=VOCAB_SIZE, full_distributions=full_distributions)


def make_groups(rewards: list[list[float]], seed: int = 0) -> list[Group]:
    """Groups of rollouts with random ids; prompt and response lengths all differ."""
    draw = random.Random(seed)
    ids = lambda low, high: tuple(draw.randrange(8, VOCAB_SIZE) for _ in range(draw.randint(low, high)))  # noqa: E731
    groups = []
    for number, row in enumerate(rewards):
        prompt = Prompt(f"p{number}", ids(3, 11), "q", "1")
        rollouts = tuple(
            Rollout(prompt, response, (-1.0,) * len(response), "stop", "") for response in (ids(1, 13) for _ in row)
        )
        verdicts = tuple(Verdict("correct" if reward else "wrong", None, "test") for reward in row)
        groups.append(Group(prompt, rollouts, verdicts, tuple(row)))
    return groups


def assign_token_weights(preset: str, groups: list[Group], beta: float = 0.3) -> list[Sample]:
    return build_objective(ObjectiveConfig(preset=preset, beta=beta), LONGEST).assign_token_weights(groups)


def gradients(trainer: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    """Main gradients after forward and backward (and the data-parallel reduction), without an update."""
    trainer.accumulate_gradients(batch)
    return {name: parameter.main_grad.clone() for name, parameter in trainer.parameters.items()}


def batch_of(samples: list[Sample], *, max_tokens: int = 1 << 20, fillers: int = 0) -> Batch:
    """One replica's batch, followed by micro-batches without a target."""
    return Batch((*pack(samples, max_tokens=max_tokens).micro_batches, *[filler()] * fillers))


def relative(found: dict, expected: dict) -> float:
    """Largest difference over all parameters, relative to the largest gradient of each."""
    return max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
    )


def with_advantages(samples: list[Sample], advantages: list[float]) -> list[Sample]:
    """The same samples with other advantages, their policy-gradient weight switched on."""
    weight = max(sample.pg_weight for sample in samples) or 1.0 / sum(len(s.response_ids) for s in samples)
    return [replace(s, advantage=a, pg_weight=weight) for s, a in zip(samples, advantages, strict=True)]


def ids_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    """The response ids of each, as tuples that can be compared and put into a set."""
    return [tuple(rollout.response_ids.tolist()) for rollout in rollouts]
