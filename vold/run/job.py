"""The job that every stage opens first: parallel layout, run directory, and exchanges between ranks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vold.config.schema import RunConfig
from vold.io import configure_logging
from vold.models.flops import peak_flops
from vold.parallel.collectives import run_on_all_ranks, set_collective_timeout
from vold.parallel.launch import Layout, initialise
from vold.run.run_dir import RunLog
from vold.run.stop import follow_launcher

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
    def world_size(self) -> int:
        return dist.get_world_size()

    def shard(self, items: Sequence[ItemT]) -> list[ItemT]:
        """This rank's items to sample and grade: every world_size-th. Each rank has its own sampler, also where several
        ranks share a copy of the trained model, so none is idle."""
        return list(items[dist.get_rank() :: self.world_size])

    def broadcast(self, value: ItemT) -> ItemT:
        """Rank 0's `value` on every rank. All ranks call."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.layout.device)
        return box[0]

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks on every rank, interleaved as before `shard`. They are pickled. All ranks call."""
        shards: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(shards, items)
        longest = max(map(len, shards))
        return [shard[row] for row in range(longest) for shard in shards if row < len(shard)]


def open_job(config: RunConfig, verb: str, *, total: int, resume: bool = False) -> Job:
    """Start logging, the process groups and the run directory.

    total: steps of the progress bar. Raises ValueError (on every rank) when the parallel sizes do not fit the number of
    processes, or the run directory holds another run.
    """
    configure_logging()
    follow_launcher()
    layout = initialise(**config.parallel.model_dump(), seed=config.seed, timeout_seconds=config.timeout_seconds)
    set_collective_timeout(config.timeout_seconds)
    peak = (peak_flops(layout.device) or 0.0) * dist.get_world_size()
    log = RunLog(config, verb, writer=dist.get_rank() == 0, total=total, peak_flops=peak)
    run_on_all_ranks(lambda: log.open(resume=resume))
    return Job(layout, getattr(torch, config.dtype), log)


def free_device_memory() -> None:
    """Free the memory of models that are no longer used, those in reference cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
