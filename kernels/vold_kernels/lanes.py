"""Two lanes of work on a GPU: matmuls on the caller's stream, row kernels on a second one, so that the row kernels of a
chunk, which are bound by memory, run under the matmuls of its neighbours, which are not.

    L logits, R row kernels, G gradient matmuls of a chunk; two buffers, used in turn

    matmuls   L0   L1   G0   L2   G1   L3   G2   G3
    rows           R0   R1        R2        R3

R waits for its L: `rows()` begins after all that the matmul lane was given so far. G, and the L that uses R's buffer
again, wait for R: `wait(done)`. No other order is needed, and no wait can be left out: tests/kernels/test_lanes.py
records every operation of the losses with the storage it reads and writes, and looks for pairs without an order.

What the lanes share is never freed too early: a tensor goes back to the lane that allocated it, so one that the other
lane uses is kept until `wait`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch


class Done(Protocol):
    """The end of some work of the row lane. Nothing may be said of it but by `Lanes.wait`."""


class Lanes:
    """A single lane: everything in the order of the calls, as on a CPU."""

    buffers = 1
    """Chunks whose logits exist at once."""

    @contextmanager
    def rows(self) -> Iterator[Done]:
        """The block's work belongs to the row lane, after all that the matmul lane was given so far. Yields its end."""
        yield self

    def wait(self, done: Done) -> None:
        """What the matmul lane is given from now on comes after that end."""


class CudaLanes(Lanes):
    """The current stream of a GPU, and a second one for the row kernels."""

    buffers = 2

    def __init__(self, device: torch.device):
        self.device = device

    @contextmanager
    def rows(self) -> Iterator[Done]:
        """As `Lanes.rows`."""
        rows_stream, done = _rows_stream(self.device), torch.cuda.Event()
        rows_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(rows_stream):
            yield done
            done.record(rows_stream)

    def wait(self, done: Done) -> None:
        """As `Lanes.wait`."""
        assert isinstance(done, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(done)


@lru_cache
def _rows_stream(device: torch.device) -> torch.cuda.Stream:
    """One for a process: torch's allocator keeps memory apart by stream."""
    return torch.cuda.Stream(device)


def lanes_of(device: torch.device, *, overlap: bool) -> Lanes:
    """Two lanes on a GPU, if asked for; else one. (Also one for fake tensors of a GPU that is not there.)"""
    has_streams = device.type == "cuda" and torch.cuda.is_available()
    return CudaLanes(device) if overlap and has_streams else Lanes()


@lru_cache
def processors(device: torch.device) -> int:
    """SMs of a GPU; 0 for a CPU and for a GPU that is not there."""
    has_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if has_gpu else 0


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that new tensors may take: free, or kept by torch's allocator without use."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
