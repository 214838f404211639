"""What one rank does in test_reshard.py: go on from a checkpoint of another layout, and leave one for the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from steps import batch_of, make_groups, make_trainer, weigh

from vold.parallel.launch import initialise, shutdown
from vold.trainer import engine, optimizer
from vold.trainer.checkpoint import Checkpoints

SAMPLES = weigh("grpo", make_groups([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0]]))


def link(student: Path, parallel: dict, dtype: str, distributed_optimizer: bool, run_dir: Path, step: int) -> None:
    """Load `step` (0: start), save it again unchanged to run_dir/again, train one step and save it, train one more.

    Writes run_dir/losses-{step}.json: loss and rate of the two steps.
    """
    layout = initialise(**parallel, seed=step)
    if distributed_optimizer:
        _distribute()
    trainer = make_trainer(student, layout, dtype=getattr(torch, dtype), warmup_steps=4, schedule="cosine")
    batch = batch_of(SAMPLES[layout.dp_rank :: layout.dp], max_tokens=40, max_over_ranks=_most(layout.dp_group))
    checkpoints = Checkpoints(run_dir, layout, keep=99)
    if step:
        checkpoints.load(trainer, step)
        Checkpoints(run_dir / f"again-{step}", layout).save(trainer, step)
    reports = [trainer.step(batch)]
    checkpoints.save(trainer, step + 1)
    reports.append(trainer.step(batch))
    if dist.get_rank() == 0:
        numbers = {name: [report.metrics[name] for report in reports] for name in ("nll", "lr")}
        (run_dir / f"losses-{step}.json").write_text(json.dumps(numbers))
    dist.barrier()
    shutdown()


def _most(group):
    def max_over_ranks(count: int) -> int:
        most = torch.tensor(count)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return int(most)

    return max_over_ranks


def _distribute() -> None:
    def distributed(config_class):
        return lambda *args, **kwargs: config_class(*args, **{**kwargs, "use_distributed_optimizer": True})

    engine.DistributedDataParallelConfig = distributed(engine.DistributedDataParallelConfig)
    optimizer.MegatronOptimizerConfig = distributed(optimizer.MegatronOptimizerConfig)
