"""What all ranks decide together: an action that fails anywhere fails everywhere, and who no longer answers."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

ResultT = TypeVar("ResultT")


def run_on_all_ranks(action: Callable[[], ResultT]) -> list[ResultT]:
    """Run on all ranks; every rank's result. A ValueError on one rank, or what its file system refuses, becomes a
    ValueError on all: none waits for ever."""
    try:
        mine = (action(), "")
    except (ValueError, OSError) as error:
        mine = (None, str(error))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for _, message in everyone:
        if message:
            raise ValueError(message)
    return [result for result, _ in everyone]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank."""
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


class SharedCounter:
    """A number that any rank adds to and reads without waiting for another; the rendezvous store keeps it. All ranks
    make theirs before a collective, and add to it after."""

    def __init__(self, name: str):
        self._store, self._name = dist.distributed_c10d._get_default_store(), f"count/{name}"
        self._before = self._store.add(self._name, 0)

    def add(self, more: int) -> None:
        self._store.add(self._name, more)

    @property
    def value(self) -> int:
        return self._store.add(self._name, 0) - self._before


def set_collective_timeout(seconds: float) -> None:
    """From here on a collective that takes longer fails. Before, ranks may be minutes apart: they are starting."""
    from megatron.core.parallel_state import update_pg_timeout

    timeout = datetime.timedelta(seconds=seconds)
    update_pg_timeout(timeout)
    dist.distributed_c10d._get_default_store().set_timeout(timeout)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank died or did not come (gloo raises plain RuntimeErrors)."""
    failed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return failed and dist.is_initialized()


def unresponsive_ranks() -> list[int]:
    """Who does not answer a roll call: dead, or stuck outside a collective.

    Called by a rank whose collective failed, at once (the peer it talked to is dead) or after the job's time-out. A
    rank that waits for one of these fails within a time-out of them, so the call lasts a little longer than that. Goes
    over the rendezvous store; the process groups are beyond use by now.
    """
    store = dist.distributed_c10d._get_default_store()
    absent = [0]
    try:
        store.set(f"roll-call/{dist.get_rank()}", "here")
        absent = list(range(dist.get_world_size()))
        deadline = time.monotonic() + 1.5 * store.timeout.total_seconds()
        while absent and time.monotonic() < deadline:
            absent = [rank for rank in absent if not store.check([f"roll-call/{rank}"])]
            time.sleep(0.2)
    except dist.DistError:  # without torchrun's agent rank 0 keeps the store, and has ended
        pass
    return absent
