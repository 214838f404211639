"""The order in which a recurrent layer reads a packing: runs of tokens, each from a sequence's first token or from
where another run ended.

A segment is a run. Of a segment whose prompt others share, the prompt is a run, from whose end the rest of the segment
and every other response to it go on. Everything follows from numbers on the host; nobody waits for the device.

T packed tokens, R runs, C tokens of a chunk, n chunks, S rows that a convolution reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 64
"""Most tokens of a chunk of the delta rule; transformers' and flash-linear-attention's number."""


@dataclass(frozen=True)
class Run:
    """Tokens [start, start + length) of a packing; parent: the number of the run that it goes on from, or None."""

    start: int
    length: int
    parent: int | None = None


@dataclass(frozen=True)
class RunLengths:
    """Runs end to end, the longest first."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def host_bounds(self) -> Tensor:
        """int64 [R + 1] on the CPU, cumulative lengths."""
        return torch.tensor((0, *self.lengths)).cumsum(0)

    @cached_property
    def bounds(self) -> Tensor:
        """int64 [R + 1] on the device."""
        return self.host_bounds.to(self.device)

    @cached_property
    def chunks(self) -> Chunks:
        return Chunks.of(self.lengths, self.device)


@dataclass(frozen=True)
class Chunks:
    """Runs in chunks of C tokens: all first chunks, then all second ones, ... each time in the order of the runs.

    token_nC     int64, the token at each place; T behind the end of a run
    place_T      int64, the place of each token among the n C
    counts       how many runs have a first chunk, a second one, ...
    """

    token_nC: Tensor
    place_T: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Chunks:
        size = min(CHUNK, lengths[0])
        length_R, total = torch.tensor(lengths, device="cpu"), sum(lengths)
        start_R, offset_C = length_R.cumsum(0) - length_R, torch.arange(size, device="cpu")
        counts = tuple(int((length_R > first).sum()) for first in range(0, lengths[0], size))
        tokens = []
        for number, count in enumerate(counts):
            within_RC = number * size + offset_C.expand(count, size)
            token_RC = start_R[:count, None] + within_RC
            tokens.append(token_RC.where(within_RC < length_R[:count, None], total))
        token_nC = torch.cat(tokens)
        place_T = token_nC.flatten().argsort(stable=True)[:total]
        return cls(token_nC.to(device), place_T.to(device), counts)


@dataclass(frozen=True)
class Runs:
    """The runs of a packing of T tokens: those that begin a sequence, then those that go on.

    beginning, following  longest first
    """

    beginning: tuple[Run, ...]
    following: tuple[Run, ...]
    device: torch.device

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int]], first_keys: Sequence[int], device: torch.device) -> Runs:
        """See PackedTokens."""
        shared: dict[int, int] = {}  # length of a prompt, by its first token; 0 where no other segment reads it
        for (queries, keys), first in zip(segments, first_keys, strict=True):
            shared[first] = max(shared.get(first, 0), keys - queries)
        beginning: dict[int, Run] = {}  # by their first token
        following, start = [], 0
        for (queries, keys), first in zip(segments, first_keys, strict=True):
            prompt = (shared[first] or queries) if keys == queries else 0
            if prompt:
                beginning[first] = Run(start, prompt)
            if queries > prompt:
                following.append((first, start + prompt, queries - prompt))
            start += queries
        order = sorted(beginning, key=lambda first: -beginning[first].length)
        number = {first: index for index, first in enumerate(order)}
        going_on = sorted((Run(start, length, number[first]) for first, start, length in following), key=_length_first)
        return cls(tuple(beginning[first] for first in order), tuple(going_on), device)

    @cached_property
    def lengths(self) -> tuple[RunLengths, ...]:
        """Of those that begin, and of those that go on where there are any."""
        groups = (self.beginning, self.following) if self.following else (self.beginning,)
        return tuple(RunLengths(tuple(run.length for run in group), self.device) for group in groups)

    @cached_property
    def parents(self) -> Tensor:
        """int64 [R]: of each that goes on, the number of its parent."""
        return torch.tensor([run.parent for run in self.following], device=self.device)

    @cached_property
    def order_T(self) -> Tensor:
        """int64: the tokens in the order of the runs."""
        spans = [torch.arange(run.start, run.start + run.length, device="cpu") for run in self._all]
        return torch.cat(spans).to(self.device)

    @cached_property
    def place_T(self) -> Tensor:
        """int64: the place of each token in that order."""
        return self.order_T.argsort()

    def windows(self, width: int) -> tuple[Tensor, Tensor]:
        """For a causal convolution of `width` rows: (int64 [S], the tokens of each run behind the width - 1 before it,
        T where there is none; int64 [T], in the order of the runs, where the window of each token begins)."""
        key = f"_windows_{width}"
        if key not in self.__dict__:
            self.__dict__[key] = self._windows(width - 1)
        return self.__dict__[key]

    def _windows(self, before: int) -> tuple[Tensor, Tensor]:
        tokens, begins, nothing = [], [], torch.full((before,), sum(run.length for run in self._all), device="cpu")
        tails, rows = [], 0
        for run in self._all:
            tail = nothing if run.parent is None else tails[run.parent]
            seen = torch.cat([tail, torch.arange(run.start, run.start + run.length, device="cpu")])
            if run.parent is None:
                tails.append(seen[len(seen) - before :])
            tokens.append(seen)
            begins.append(torch.arange(rows, rows + run.length, device="cpu"))
            rows += len(seen)
        return torch.cat(tokens).to(self.device), torch.cat(begins).to(self.device)

    @property
    def _all(self) -> tuple[Run, ...]:
        return self.beginning + self.following


def _length_first(run: Run) -> int:
    return -run.length
