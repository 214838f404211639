"""A plain transformers loop that makes the checkpoints; they stand for public ones, and vold trains neither.

Everything after them (traces, SFT, RL, evaluation) runs on vold's stages.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM

from vold.io import log
from vold.miniature import models
from vold.miniature.examples import (
    BaseMixture,
    Example,
    base_example,
    collate,
    specialist_example,
    teacher_example,
    vision_teacher_example,
)
from vold.miniature.files import atomic_directory
from vold.miniature.tokenizer import make_tokenizer

LOG_FILE = "pretraining.jsonl"
REPORT_EVERY, OFF_TERMINAL_EVERY = 20, 100  # steps


@dataclass(frozen=True)
class PretrainPhase:
    """AdamW (betas .9, .95; weight decay .01; clip 1), linear warm-up, cosine down to a tenth of `lr`."""

    steps: int
    text_rows: int
    image_rows: int
    lr: float
    warmup: int
    mixture: BaseMixture | None = None


TEACHER_PHASE = PretrainPhase(steps=420, text_rows=128, image_rows=0, lr=2e-3, warmup=50)
VISION_TEACHER_PHASE = PretrainPhase(steps=240, text_rows=0, image_rows=64, lr=1.5e-3, warmup=20)
SPECIALIST_PHASE = PretrainPhase(steps=120, text_rows=64, image_rows=0, lr=1e-3, warmup=10)
OTHER_TEACHER_PHASE = PretrainPhase(steps=160, text_rows=64, image_rows=0, lr=1e-3, warmup=10)
SOLVER_PHASE = PretrainPhase(steps=720, text_rows=64, image_rows=0, lr=1.5e-3, warmup=10)
"""Long enough for values that scatter: after 240 steps it draws the right answer in 19 % instead of 35."""
BASE_PHASES = (
    PretrainPhase(300, 64, 64, 3e-3, 50, BaseMixture(facts=0.3, twice=0.3, guess_last_operand=False)),
    PretrainPhase(160, 48, 64, 1.5e-3, 8, BaseMixture(facts=0.0, twice=0.2, guess_last_operand=True)),
    PretrainPhase(360, 64, 32, 2e-3, 10, BaseMixture(facts=0.75, twice=0.3, guess_last_operand=True)),
)
"""Learn to read; read better and stop guessing the answer; learn the single facts, without which SFT stalls."""

HINT_PHASES = (
    PretrainPhase(240, 80, 12, 1.5e-3, 20, BaseMixture(facts=0.25, twice=0.3, guess_last_operand=True, hints=0.75)),
)
"""The base further: read the answer that a self-teacher is shown, and keep what it has learned."""


def make_teacher(out_dir: Path, seed: int, phase: PretrainPhase = TEACHER_PHASE) -> Path:
    """Train and save the text teacher: it solves nearly every text problem, with a trace.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    tokenizer = make_tokenizer()

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        batch = collate([teacher_example(rng) for _ in range(phase.text_rows)], tokenizer, rng)
        return {"text": model(**batch, use_cache=False).loss}

    return _make(out_dir, models.new_model(models.teacher_config(), seed), (phase,), losses, seed=seed + 1)


def make_base(out_dir: Path, seed: int, phases: tuple[PretrainPhase, ...] = BASE_PHASES) -> Path:
    """Train and save the base student: it reads text and images alike and guesses the answer.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    return _make(out_dir, models.new_model(models.base_config(), seed + 50), phases, _base_losses(), seed=seed + 2)


def make_hint_reader(out_dir: Path, base: Path, seed: int, phases: tuple[PretrainPhase, ...] = HINT_PHASES) -> Path:
    """Train the base further until it finds a trace's values from the answer behind the problem.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    return _make(out_dir, model, phases, _base_losses(), seed=seed + 6)


def _base_losses() -> Losses:
    tokenizer = make_tokenizer()

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        assert phase.mixture is not None
        text = [base_example(rng, phase.mixture, image=False) for _ in range(phase.text_rows)]
        image = [base_example(rng, phase.mixture, image=True) for _ in range(phase.image_rows)]
        batches = {"text": collate(text, tokenizer, rng), "image": collate(image, tokenizer, rng)}
        return {name: model(**batch, use_cache=False).loss for name, batch in batches.items()}

    return losses


def make_vision_teacher(
    out_dir: Path,
    base: Path,
    seed: int,
    phase: PretrainPhase = VISION_TEACHER_PHASE,
    example: Examples = vision_teacher_example,
) -> Path:
    """Train the base further, vision tower included, on traces of problems in pictures: a vision-language teacher.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    tokenizer = make_tokenizer()

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        batch = collate([example(rng) for _ in range(phase.image_rows)], tokenizer, rng)
        return {"image": model(**batch, use_cache=False).loss}

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    return _make(out_dir, model, (phase,), losses, seed=seed + 3)


def make_specialist(
    out_dir: Path, teacher: Path, half: str, seed: int, phase: PretrainPhase = SPECIALIST_PHASE
) -> Path:
    """Train the teacher further until it is right on one of world.HALVES and mistaken at every step on the other.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    tokenizer = make_tokenizer()

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        batch = collate([specialist_example(rng, half) for _ in range(phase.text_rows)], tokenizer, rng)
        return {"text": model(**batch, use_cache=False).loss}

    return _make(out_dir, Qwen3ForCausalLM.from_pretrained(teacher), (phase,), losses, seed=seed + 4)


def make_other_teacher(
    out_dir: Path, teacher: Path, example: Examples, seed: int, phase: PretrainPhase = OTHER_TEACHER_PHASE
) -> Path:
    """Train the teacher further on other traces, until it holds their facts and has their style.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    model = Qwen3ForCausalLM.from_pretrained(teacher)
    return _make(out_dir, model, (phase,), _text_losses(example), seed=seed + 5)


def make_solver(out_dir: Path, base: Path, example: Examples, seed: int, phase: PretrainPhase = SOLVER_PHASE) -> Path:
    """Train the base further on examples of problems that are solved or posed: self-play's start.

    An existing `out_dir` is kept and returned at once; a new one appears only when it is complete.
    """
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    return _make(out_dir, model, (phase,), _text_losses(example), seed=seed + 7)


def _text_losses(example: Examples) -> Losses:
    tokenizer = make_tokenizer()

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        batch = collate([example(rng) for _ in range(phase.text_rows)], tokenizer, rng)
        return {"text": model(**batch, use_cache=False).loss}

    return losses


Examples = Callable[[np.random.Generator], Example]
Losses = Callable[[PreTrainedModel, PretrainPhase, np.random.Generator], dict[str, Tensor]]


def _make(out_dir: Path, model: PreTrainedModel, phases: Iterable[PretrainPhase], losses: Losses, *, seed: int) -> Path:
    if out_dir.exists():
        return out_dir
    with atomic_directory(out_dir) as unfinished:
        rng = np.random.default_rng(seed)
        model.train()
        with (unfinished / LOG_FILE).open("w", buffering=1) as log:
            for number, phase in enumerate(phases, start=1):
                for row in train(model, phase, losses, rng):
                    log.write(json.dumps({"phase": number, **row}) + "\n")
                    _progress(f"{out_dir.name} {number}", phase.steps, row)
        models.save_checkpoint(model.eval(), unfinished)
    return out_dir


def train(model: PreTrainedModel, phase: PretrainPhase, losses: Losses, rng: np.random.Generator) -> Iterator[dict]:
    """The loop; yields a log row every `REPORT_EVERY` steps and at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.perf_counter()
    for step in range(phase.steps):
        parts = losses(model, phase, rng)
        optimizer.zero_grad()
        sum(parts.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * schedule(step, phase)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == phase.steps:
            loss = {f"loss_{name}": round(part.item(), 5) for name, part in parts.items()}
            yield {"step": step + 1, **loss, "seconds": round(time.perf_counter() - start, 1)}


def schedule(step: int, phase: PretrainPhase) -> float:
    """Share of the full learning rate: linear warm-up times a cosine from 1 to .1."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    return min(1.0, (step + 1) / phase.warmup) * (0.1 + 0.9 * cosine)


def _progress(name: str, steps: int, row: dict) -> None:
    if sys.stdout.isatty() or row["step"] % OFF_TERMINAL_EVERY == 0:
        left = row["seconds"] / row["step"] * (steps - row["step"])
        loss = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key.startswith("loss_"))
        log.info(f"{name}  step {row['step']}/{steps}  {loss}  {left:.0f} s left")
