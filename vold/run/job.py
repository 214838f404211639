"""What every stage opens first: layout, run directory, and a few sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vold.config.schema import RunConfig
from vold.models.flops import peak_flops
from vold.parallel.collectives import run_on_all_ranks, set_collective_timeout
from vold.parallel.launch import Layout, initialise
from vold.run.run_dir import RunLog

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Job:
    """One rank's view of a running stage."""

    layout: Layout
    dtype: torch.dtype
    log: RunLog

    @property
    def is_writer(self) -> bool:
        return dist.get_rank() == 0

    @property
    def world(self) -> int:
        return dist.get_world_size()

    def share(self, items: Sequence[ItemT]) -> list[ItemT]:
        """What this rank samples and grades: every world-th item. Each rank has a sampler of its own, also where
        several share a copy of the trained model, so none waits."""
        return list(items[dist.get_rank() :: self.world])

    def from_writer(self, value: ItemT) -> ItemT:
        """The writing rank's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.layout.device)
        return box[0]

    def gather(self, items: list[Any]) -> list[Any]:
        """Every rank's small objects on every rank, interleaved so that `share` is undone."""
        shares: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(shares, items)
        longest = max(map(len, shares))
        return [share[row] for row in range(longest) for share in shares if row < len(share)]


def open_job(config: RunConfig, verb: str, *, total: int, resume: bool = False) -> Job:
    """Start the process groups and the run directory. Raises ValueError (on every rank) when they do not fit."""
    layout = initialise(**config.parallel.model_dump(), seed=config.seed)
    set_collective_timeout(config.timeout_seconds)
    peak = peak_flops(layout.device)
    peak = peak and peak * dist.get_world_size()
    log = RunLog(config, verb, writer=dist.get_rank() == 0, total=total, peak_flops=peak)
    run_on_all_ranks(lambda: log.open(resume=resume))
    return Job(layout, getattr(torch, config.dtype), log)
