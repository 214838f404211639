"""The process of test_save_boundaries.py: resumes from step 2, saves step 3 and is killed on the way."""

from __future__ import annotations

from pathlib import Path

import torch
from ckpt_chaos.inject import arm

from support.steps import assign_token_weights, batch_of, make_groups, make_trainer
from vold.parallel.launch import initialise
from vold.trainer.checkpoint import Checkpoints

BATCH = batch_of(assign_token_weights("grpo", make_groups([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])), max_tokens=40)


def save_step_3(student: Path, run_dir: Path, log: Path, boundary: int | None, mode: str) -> None:
    """boundary: number of the file operation below run_dir/checkpoints at which it is killed; None: it is not."""
    layout = initialise(seed=0)
    trainer, checkpoints = make_trainer(student, layout), Checkpoints(run_dir, layout, keep=1)
    checkpoints.load(trainer, 2)
    torch.rand(3)
    trainer.step(BATCH)
    arm(str(run_dir / "checkpoints"), boundary, mode, str(log), torn_python=True)
    checkpoints.save(trainer, 3)
