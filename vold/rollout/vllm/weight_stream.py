"""The weight sync from the trainer's first rank to engines in other processes, tensor by tensor: over NCCL on GPUs,
over gloo on CPUs. Each sync has its own process group, so that engines may come and go in between.

A tensor's name, dtype and shape go through the group's store, its numbers through a broadcast. Neither side ever holds
a second copy of the model. On a GPU this is not measured yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 120.0
"""A weight sync without progress for so long has failed: an engine died in it."""
POLL_SECONDS = 2e-4


def open_store(address: str, world: int) -> dist.TCPStore:
    """Open the rendezvous store of `world` members on this machine, at `address` and the port it then has."""
    return dist.TCPStore(address, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))


def send(store: dist.TCPStore, world: int, named_weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Broadcast the weights as member 0. Raises ConnectionError when another member is lost."""
    with _named_loss():
        group = _join(store, 0, world, device)
    number = 0
    for number, (name, tensor) in enumerate(named_weights, start=1):
        sent = tensor.detach().to(device).contiguous()
        store.set(str(number), json.dumps([name, str(sent.dtype).removeprefix("torch."), list(sent.shape)]))
        with _named_loss(group):
            _wait(group.broadcast(sent, 0))
    store.set(str(number + 1), "")
    with _named_loss(group):
        _leave(group, device)


def receive(address: str, port: int, rank: int, world: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that member 0 broadcasts, each in newly allocated memory."""
    store = dist.TCPStore(address, port, world, is_master=False, timeout=timedelta(seconds=SECONDS))
    group = _join(store, rank, world, device)
    number = 1
    while spec := store.get(str(number)):
        name, dtype, shape = json.loads(spec)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        _wait(group.broadcast(tensor, 0))
        yield name, tensor
        number += 1
    _leave(group, device)


def _join(store: dist.TCPStore, rank: int, world: int, device: torch.device) -> dist.distributed_c10d.Backend:
    """A process group outside torch.distributed's global state, which the trainer's and the engine's groups use."""
    timeout = timedelta(seconds=SECONDS)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, world, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # its watchdog, which ends the process, comes after `_wait`
    return dist.ProcessGroupNCCL(store, rank, world, options)


def _leave(group: dist.distributed_c10d.Backend, device: torch.device) -> None:
    """Wait until all members have received everything: the store ends with member 0. An all-reduce, because NCCL's
    barrier would guess the device."""
    token = torch.zeros(1, device=device)
    _wait(group.allreduce([token]))
    group.shutdown()


def _wait(work: dist.Work) -> None:
    """Wait on the host until a collective is over. NCCL's own `wait` only orders streams: it returns at once, and a
    member that died is noticed by nobody but the watchdog, which ends the process. Raises RuntimeError after `SECONDS`,
    or for what the collective itself failed with."""
    deadline = time.monotonic() + SECONDS
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no progress for {SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    work.wait()


@contextmanager
def _named_loss(group: dist.distributed_c10d.Backend | None = None) -> Iterator[None]:
    """Re-raise torch's plain RuntimeErrors as ConnectionErrors: a lost rank of the trainer raises RuntimeErrors too.
    The group is given up, so that nothing waits for its members any longer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(group, getattr(dist, "ProcessGroupNCCL", ())):
            group.abort()
        raise ConnectionError(f"an engine was lost while it received weights ({error})") from error
