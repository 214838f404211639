"""Dropout of what LoRA's A reads (arXiv 2106.09685, section 4.2), the same numbers on every layout.

A mask depends on the adapter's seed, the update, the pass, the name of the matrix and the token's place alone, not on
tensor, sequence, context or pipeline parallelism. The pass's seed is that of torch's generator on the CPU while the
pass runs: both kinds of recomputation put that back, so that a layer computed again draws the same masks.

T tokens of this rank, D inputs, R rank of the update.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor


class Share(NamedTuple):
    """This rank's part of a dimension: of every `stripes`-th from number `stripe` on (context parallelism) the share of
    number `rank` among `ranks`."""

    ranks: int = 1
    rank: int = 0
    stripes: int = 1
    stripe: int = 0


class Dropout:
    """One chunk's dropout: on in passes that train, off where the model is read (log-probs, scoring).

    p: probability that an input is dropped. seed: of the run's masks.
    """

    def __init__(self, p: float, seed: int):
        self._p, self._seed = p, seed
        self._update: tuple[int, ...] = ()
        self._passes, self._is_on = 0, False

    def begin_update(self, *number: int) -> None:
        """The next passes are of this update, whose number has to differ from those before it and between replicas."""
        self._update, self._passes = number, 0

    @contextmanager
    def forward_pass(self, *, training: bool) -> Iterator[None]:
        """A pass through the chunk; with gradients and in training it drops inputs, also when it is computed again."""
        self._is_on = self._p > 0 and training and torch.is_grad_enabled()
        if not self._is_on:
            yield
            return
        seed = zlib.crc32(f"{self._seed} {self._update} {self._passes}".encode())
        self._passes += 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            with _everywhere():
                yield

    def linear(self, x_T1D: Tensor, A_RD: Tensor, name: str, rows: Share, columns: Share) -> Tensor:
        """[T, 1, R]: dropout(x) times A. rows, columns: which of the whole [T, 1, D] x is."""
        if not self._is_on:
            return F.linear(x_T1D, A_RD)
        seed = zlib.crc32(f"{torch.initial_seed()} {name}".encode())
        return _DroppedLinear.apply(x_T1D, A_RD, partial(self._mask, seed, rows, columns))  # pyright: ignore

    def _mask(self, seed: int, rows: Share, columns: Share, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for each element of x."""
        if x.is_meta:
            return torch.empty_like(x)
        generator = torch.Generator(x.device).manual_seed(seed)
        shape = (x.shape[0] * rows.ranks * rows.stripes, *x.shape[1:-1], x.shape[-1] * columns.ranks)
        kept = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self._p, generator=generator)
        kept = kept[rows.stripe :: rows.stripes]
        kept = kept.chunk(rows.ranks, 0)[rows.rank].chunk(columns.ranks, -1)[columns.rank]
        return kept.to(x.dtype) / (1 - self._p)


@contextmanager
def _everywhere() -> Iterator[None]:
    """Under sequence parallelism Megatron runs layers with a state of its tracker, which without a GPU is the state of
    the generator on the CPU: inside, all of them are that of now."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    if torch.cuda.is_available() or not states:
        yield
        return
    tracker.set_states(dict.fromkeys(states, torch.get_rng_state()))
    yield
    tracker.set_states(states)


class _DroppedLinear(torch.autograd.Function):
    """dropout(x) times A, whose backward pass draws the mask again: it keeps x and A, as without dropout."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.mask = mask
        return F.linear(x * mask(x), A)

    @staticmethod
    def backward(ctx, d_low: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A = ctx.saved_tensors
        mask = ctx.mask(x)
        d_x = d_low @ A * mask if ctx.needs_input_grad[0] else None
        d_A = d_low.flatten(0, -2).t() @ (x * mask).flatten(0, -2)
        return d_x, d_A, None
