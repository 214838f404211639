"""Decisions of all ranks together: an action that fails on one rank fails on all, and ranks that died are named."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from vold.file_errors import file_error_line

ResultT = TypeVar("ResultT")


def run_on_all_ranks(action: Callable[[], ResultT]) -> list[ResultT]:
    """Run an action on all ranks and return every rank's result. A ValueError or OSError on one rank becomes a
    ValueError on all, so that no rank waits for one that failed."""
    try:
        outcome = (action(), "")
    except (ValueError, OSError) as error:
        outcome = (None, file_error_line(error) or str(error))
    outcomes: list = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for _, message in outcomes:
        if message:
            raise ValueError(message)
    return [result for result, _ in outcomes]


def largest_of_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values, on every rank."""
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


class RanksLost(RuntimeError):
    """Ranks of this job are dead or were never there. The message, one line, names them."""


_store: dist.Store | None = None


def use_store(store: dist.Store) -> None:
    """Set the store through which the ranks of this job find each other."""
    global _store
    _store = store


def note_start(store: dist.Store, rank: int | None = None) -> int:
    """The number of ranks that have started, `rank` among them from now on."""
    if rank is not None:
        store.set(f"started/{rank}", "yes")
    return store.add("started", int(rank is not None))


def ranks_not_started(store: dist.Store, world: int) -> list[int]:
    """Ranks that have not called `note_start`."""
    return [rank for rank in range(world) if not store.check([f"started/{rank}"])]


class SharedCounter:
    """A counter in the rendezvous store, which every rank adds to and reads without waiting for another. All ranks
    create it before a collective, and add to it after."""

    def __init__(self, name: str):
        self._store, self._name = dist.distributed_c10d._get_default_store(), f"count/{name}"
        self._before = self._store.add(self._name, 0)

    def add(self, count: int) -> None:
        self._store.add(self._name, count)

    @property
    def value(self) -> int:
        return self._store.add(self._name, 0) - self._before


def set_collective_timeout(seconds: float) -> None:
    """Let every collective from here on fail after so many seconds."""
    from megatron.core.parallel_state import update_pg_timeout

    timeout = datetime.timedelta(seconds=seconds)
    update_pg_timeout(timeout)
    dist.distributed_c10d._get_default_store().set_timeout(timeout)


def is_lost_peer(error: Exception) -> bool:
    """True for the error of a collective in which another rank died or was missing (gloo raises RuntimeErrors)."""
    failed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return failed and (dist.is_initialized() or _store is not None)


def unresponsive_ranks() -> list[int]:
    """Ranks that are dead, or stuck outside a collective.

    Called by a rank whose collective failed, at once (the peer it talked to is dead) or after the job's time-out. Every
    rank that lives gets there within a time-out of the first, so the call waits a little longer than that. It uses the
    rendezvous store, since the process groups no longer work.
    """
    store = _store or dist.distributed_c10d._get_default_store()
    missing = [0]
    try:
        store.set(f"alive/{os.environ.get('RANK', '0')}", "yes")
        missing = list(range(int(os.environ.get("WORLD_SIZE", "1"))))
        deadline = time.monotonic() + 1.5 * store.timeout.total_seconds()
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"alive/{rank}"])]
            time.sleep(0.2)
    except dist.DistError:  # without torchrun's agent rank 0 keeps the store, and has ended
        pass
    return missing
