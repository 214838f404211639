"""Samples whose tokens went to experts that no router chose, and the rank function of test_router_replay.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from support.steps import LONGEST, OPTIMIZER, VOCAB_SIZE, make_groups
from vold.data.packing import pack
from vold.models.weights import export_weights
from vold.objectives import PRESETS, split_minibatches
from vold.parallel.launch import initialise, shutdown
from vold.trainer.trainer import Trainer
from vold.types import Sample

EXPERTS, CHOSEN, LAYERS = 8, 2, 4
LAYOUTS = [
    dict(tp=2, sp=True, ep=2),
    dict(tp=2, sp=True, recompute="selective"),
    dict(cp=2, ep=2),
    dict(pp=2, vpp=2, recompute="full"),
    dict(ep=2),
]
OBJECTIVE = replace(PRESETS["grpo"], max_response_tokens=LONGEST)


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


@contextmanager
def noted(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the routers' choices [T, k], layer by layer."""
    found: list[Tensor] = []
    handles = [r.register_forward_hook(lambda _m, _i, out: found.append(out[-1].clone())) for r in routers(model)]
    yield found
    for handle in handles:
        handle.remove()


@contextmanager
def forced(model: torch.nn.Module, experts: np.ndarray) -> Iterator[None]:
    """transformers' routers send token t of the one sequence to experts[t, layer], weighted by their own logits."""

    def choose(layer: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.from_numpy(experts[:, layer].astype(np.int64))
        weights = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    handles = [
        router.register_forward_hook(lambda _m, _i, out, layer=layer: choose(layer, out[0]))
        for layer, router in enumerate(routers(model))
    ]
    yield
    for handle in handles:
        handle.remove()


def samples(minibatches: int = 1) -> list[Sample]:
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0], [1.0, 0.0, 1.0]]
    return OBJECTIVE.assign_token_weights(make_groups(rewards), minibatches=minibatches)


def rerouted(share: float = 0.4) -> list[Sample]:
    """Each sample with experts at random, of its siblings the same for the prompt; for some tokens none."""
    draw = np.random.default_rng(0)

    def chosen(tokens: int) -> np.ndarray:
        experts = draw.random((tokens, LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN].astype(np.int16)
        experts[draw.random(tokens) > share] = -1
        return experts

    plain = samples()
    prompts = {s.prompt.id: chosen(len(s.prompt.token_ids)) for s in plain}
    return [replace(s, experts=np.concatenate([prompts[s.prompt.id], chosen(len(s.response_ids) - 1)])) for s in plain]


def open_trainer(student: Path, layout, mode: str | None, **numbers) -> Trainer:
    sizes = {"steps": 3, "dtype": torch.float32, "vocab_size": VOCAB_SIZE}
    optimizer = OPTIMIZER.model_copy(update={"eps": 1e-5, "clip_grad": 1e9} | numbers)
    return Trainer(student, layout, optimizer, objective=OBJECTIVE, router_replay=mode, **sizes)


def take_step(
    trainer: Trainer, parts: Sequence[Sequence[Sample]], max_tokens: int = 30
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(whole gradients of the last update, metrics)"""
    batches = [pack(part, max_tokens=max_tokens, replicas=trainer.replicas) for part in parts]
    assert max_tokens > 30 or len(batches[0].micro_batches) > 1
    metrics = trainer.step(*batches).metrics
    named = export_weights(trainer.chunks, lambda parameter: parameter.main_grad)
    return {name: tensor.clone() for name, tensor in named}, metrics


def r2_step(student: Path, layout) -> dict[str, Tensor]:
    """Gradients of the second of two updates."""
    parts = split_minibatches(samples(minibatches=2))
    return take_step(open_trainer(student, layout, "R2", lr=0.02), parts)[0]


def rank(student: Path, out: Path) -> None:
    for number, sizes in enumerate(LAYOUTS):
        layout = initialise(**sizes, seed=0)
        found, metrics = take_step(open_trainer(student, layout, "R3"), [rerouted()])
        again = r2_step(student, layout) if "cp" in sizes or "vpp" in sizes else {}
        if dist.get_rank() == 0:
            save_file(found, out / f"{number}.safetensors")
            save_file(again, out / f"{number}-r2.safetensors")
            (out / f"{number}.json").write_text(json.dumps(metrics))
    shutdown()
