"""Weights from the trainer's first rank to engines in other processes, a tensor at a time: over NCCL on GPUs, over gloo
on CPUs. A process group of its own for each hand-over, so that engines may come and go in between.

What a tensor is (name, dtype, shape) goes through the group's store, its numbers through a broadcast. Neither side ever
holds a copy of the model. On a GPU this is not measured yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 120.0
"""Without progress for so long, a hand-over has failed: an engine died in it."""


def open_store(address: str, world: int) -> dist.TCPStore:
    """Where the `world` members meet: at `address`, which is this machine, and the `port` that the store then has."""
    return dist.TCPStore(address, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))


def send(store: dist.TCPStore, world: int, named_weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Member 0's part. Raises ConnectionError when another is lost."""
    with _named_loss():
        group = _join(store, 0, world, device)
    place = 0
    for place, (name, tensor) in enumerate(named_weights, start=1):
        sent = tensor.detach().to(device).contiguous()
        store.set(str(place), json.dumps([name, str(sent.dtype).removeprefix("torch."), list(sent.shape)]))
        with _named_loss():
            group.broadcast(sent, 0).wait()
    store.set(str(place + 1), "")
    with _named_loss():
        _leave(group, device)


def receive(address: str, port: int, rank: int, world: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Another member's part: each weight in memory of its own."""
    store = dist.TCPStore(address, port, world, is_master=False, timeout=timedelta(seconds=SECONDS))
    group = _join(store, rank, world, device)
    place = 1
    while spec := store.get(str(place)):
        name, dtype, shape = json.loads(spec)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        group.broadcast(tensor, 0).wait()
        yield name, tensor
        place += 1
    _leave(group, device)


def _join(store: dist.TCPStore, rank: int, world: int, device: torch.device) -> dist.distributed_c10d.Backend:
    """Outside torch.distributed's global state: the trainer's own groups and the engine's know nothing of it."""
    timeout = timedelta(seconds=SECONDS)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, world, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world, options)


def _leave(group: dist.distributed_c10d.Backend, device: torch.device) -> None:
    """Once all are through: the store goes with member 0. Not NCCL's barrier, which would guess the device."""
    here = torch.zeros(1, device=device)
    group.allreduce([here]).wait()
    here.item()
    group.shutdown()


@contextmanager
def _named_loss() -> Iterator[None]:
    """torch raises plain RuntimeErrors, which a rank lost to the trainer's own groups would cause as well."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"an engine was lost while it received weights ({error})") from error
