"""What one rank does in test_reshard.py: go on from a checkpoint of another layout, and leave one for the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from steps import make_groups, make_trainer, weigh

from vold.data.pack import pack
from vold.parallel.launch import initialise, shutdown
from vold.trainer.checkpoint import Checkpoints

SAMPLES = weigh("grpo", make_groups([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0]]))


def link(student: Path, parallel: dict, dtype: str, run_dir: Path, step: int) -> None:
    """Load `step` (0: start), save it again unchanged to run_dir/again-{step}, train one step and save it, train one
    more. Writes run_dir/steps-{step}.json: three numbers of the two steps."""
    layout = initialise(**parallel, seed=step)
    trainer = make_trainer(student, layout, dtype=getattr(torch, dtype), warmup_steps=4, schedule="cosine")
    batch = pack(SAMPLES, max_tokens=40, replicas=trainer.replicas)
    checkpoints = Checkpoints(run_dir, layout, keep=99)
    if step:
        checkpoints.load(trainer, step)
        Checkpoints(run_dir / f"again-{step}", layout).save(trainer, step)
    reports = [trainer.step(batch)]
    checkpoints.save(trainer, step + 1)
    reports.append(trainer.step(batch))
    if dist.get_rank() == 0:
        numbers = {name: [report.metrics[name] for report in reports] for name in ("nll", "lr", "grad_norm")}
        (run_dir / f"steps-{step}.json").write_text(json.dumps(numbers))
    dist.barrier()
    shutdown()
