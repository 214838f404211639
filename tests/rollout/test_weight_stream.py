"""Weights between processes, over gloo: what was sent arrives, one by one; a lost receiver is a ConnectionError.

The members are threads here: the groups are apart from torch.distributed's global state.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import Tensor

from vold.rollout.vllm import weight_stream

CPU, HERE = torch.device("cpu"), "127.0.0.1"
WEIGHTS = {
    "matrix": torch.randn(5, 3),
    "transposed": torch.randn(4, 6).bfloat16().t(),
    "number": torch.tensor(3.0),
    "integers": torch.arange(7),
}


def test_all_receive_what_was_sent():
    store = weight_stream.open_store(HERE, 3)
    with ThreadPoolExecutor() as pool:
        received = [
            pool.submit(lambda rank: dict(weight_stream.receive(HERE, store.port, rank, 3, CPU)), rank)
            for rank in (1, 2)
        ]
        weight_stream.send(store, 3, WEIGHTS.items(), CPU)
    for found in (call.result() for call in received):
        assert list(found) == list(WEIGHTS)
        assert all(found[name].dtype == w.dtype and torch.equal(found[name], w) for name, w in WEIGHTS.items())


def test_a_tensor_is_sent_before_the_next_is_made():
    """Never a copy of the model: the sender makes the second only when the first has arrived."""
    store, arrived = weight_stream.open_store(HERE, 2), Event()

    def make() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.ones(2)
        assert arrived.wait(100.0)
        yield "second", torch.ones(3)

    def take() -> list[str]:
        received = weight_stream.receive(HERE, store.port, 1, 2, CPU)
        names = [next(received)[0]]
        arrived.set()
        return names + [name for name, _ in received]

    with ThreadPoolExecutor() as pool:
        call = pool.submit(take)
        weight_stream.send(store, 2, make(), CPU)
        assert call.result() == ["first", "second"]


def test_a_lost_receiver_is_a_connection_error(monkeypatch):
    monkeypatch.setattr(weight_stream, "SECONDS", 5.0)
    store = weight_stream.open_store(HERE, 2)

    def one_only() -> None:
        next(weight_stream.receive(HERE, store.port, 1, 2, CPU))

    with ThreadPoolExecutor() as pool:
        call = pool.submit(one_only)
        with pytest.raises(ConnectionError, match="lost while it received weights"):
            weight_stream.send(store, 2, WEIGHTS.items(), CPU)
        call.result()


class StalledGroup:
    """NCCL towards an engine that is gone: `wait` orders streams and returns, and nothing is ever received."""

    def broadcast(self, *_args) -> StalledGroup:
        return self

    def is_completed(self) -> bool:
        return False

    def wait(self) -> bool:
        return True


def test_an_engine_that_stalls_is_one_line_in_time(monkeypatch):
    monkeypatch.setattr(weight_stream, "SECONDS", 0.2)
    monkeypatch.setattr(weight_stream, "_join", lambda *_args: StalledGroup())
    store = weight_stream.open_store(HERE, 2)
    line = r"an engine was lost while it received weights \(no progress for 0\.2 s\)"
    with pytest.raises(ConnectionError, match=line):
        weight_stream.send(store, 2, WEIGHTS.items(), CPU)
