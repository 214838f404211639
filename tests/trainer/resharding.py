"""One rank of test_reshard.py: resumes from a checkpoint of another layout and saves one for the next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from support.steps import LONGEST, VOCAB_SIZE, make_groups, make_trainer
from vold.config.schema import AdapterConfig, ObjectiveConfig
from vold.data.packing import pack
from vold.objectives import build_objective
from vold.parallel.launch import initialise, shutdown
from vold.teacher import SelfTeacher
from vold.trainer.checkpoint import Checkpoints
from vold.types import Hint, Prompt

OBJECTIVE = build_objective(ObjectiveConfig(preset="srpo", top_k=5), LONGEST)
SAMPLES = OBJECTIVE.assign_token_weights(make_groups([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0]]))


def hinted(prompt: Prompt, hint: Hint) -> Prompt:
    """The self-teacher's prompt is longer."""
    return replace(prompt, token_ids=(*prompt.token_ids, 9, 10, 11))


def link(student: Path, parallel: dict, dtype: str, run_dir: Path, step: int, adapter: AdapterConfig | None) -> None:
    """Load `step` (0: start), save it again unchanged to run_dir/again-{step}, train one step and save it, train one
    more. Writes run_dir/steps-{step}.json: a few numbers of the two steps. Policy gradient and self-teacher are in it:
    the student's average is part of the state."""
    layout = initialise(**parallel, seed=step)
    settings = dict(
        dtype=getattr(torch, dtype), warmup_steps=4, schedule="cosine", objective=OBJECTIVE, adapter=adapter
    )
    trainer = make_trainer(student, layout, **settings)
    numbers = dict(
        max_tokens=40, temperature=1.0, vocab_size=VOCAB_SIZE, confident=OBJECTIVE.self_distillation.confident
    )
    teacher = SelfTeacher(trainer.average, layout, hinted, **numbers)
    batch = pack(SAMPLES, max_tokens=40, replicas=trainer.replicas)
    checkpoints = Checkpoints(run_dir, layout, keep=99)
    if step:
        checkpoints.load(trainer, step)
        Checkpoints(run_dir / f"again-{step}", layout).save(trainer, step)
    reports = [trainer.step(teacher.score(batch))]
    checkpoints.save(trainer, step + 1)
    reports.append(trainer.step(teacher.score(batch)))
    if dist.get_rank() == 0:
        numbers = {name: [report.metrics[name] for report in reports] for name in ("nll", "kl_loss", "lr", "grad_norm")}
        (run_dir / f"steps-{step}.json").write_text(json.dumps(numbers))
    dist.barrier()
    shutdown()
