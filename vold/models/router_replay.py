"""The choices of a mixture's routers in the trainer: compared with the sampler's, and replayed.

Sampler and trainer compute with other kernels. Where two experts are about as probable, their routers may choose
differently, and the log-probs of that token are those of another network. Replayed choices are taken as they are; the
weights of the chosen experts follow from the trainer's own router, and its gradient with them. R3 replays the sampler's
choices (arXiv 2510.11370), R2 those of the trainer before the step's first update (arXiv 2507.18071, section 5.3).

t tokens of this rank, L layers of the whole model, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = -1
"""In the place of an expert: the sampler has no choice for this token."""

Record = dict[int, Tensor]
"""Layer number, from 1 -> the choices [t, k] of one forward pass."""


class RouterReplay:
    """One chunk's part of it. mode: see RolloutConfig.router_replay. differing_2: token-layer pairs whose set of
    experts is not the sampler's, and all pairs compared, of this rank since `begin_step`."""

    def __init__(self, mode: str | None, device: torch.device):
        self._mode = mode
        self._records: dict[int, list[Record]] = {}
        self._recording: list[Record] | None = None
        self._replayed: Iterator[Record] = iter(())
        self._counts_in_training: bool | None = None
        self.differing_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def begin_step(self) -> None:
        self.differing_2.zero_()
        self.end_step()

    def before_update(self, number: int) -> None:
        """The next forward passes read the step's minibatch `number` with the weights before the first update."""
        self._recording = self._records.setdefault(number, []) if self._mode == "R2" else None
        self._counts_in_training = False

    def update(self, number: int, *, counts: bool) -> None:
        """The next ones train on it. counts: nothing has read it before."""
        self._recording, self._replayed = None, iter(self._records.pop(number, ()))
        self._counts_in_training = True if counts else None

    def end_step(self) -> None:
        """What is read from now on is neither counted nor recorded."""
        self._records.clear()
        self._recording, self._replayed, self._counts_in_training = None, iter(()), None

    def forward_pass(self, sampled_tLk: Tensor | None) -> PassRouting:
        """Of the next micro-batch, whose tokens on this rank the sampler sent to these experts (NONE: it does not
        say)."""
        record: Record = {}
        if self._recording is not None:
            self._recording.append(record)
            return PassRouting(sampled_tLk, self, records=record)
        return PassRouting(sampled_tLk, self, replayed=next(self._replayed, record))

    @property
    def replays_sampler(self) -> bool:
        return self._mode == "R3"

    @property
    def counts(self) -> bool:
        """Once for each pass, also where layers are computed again."""
        return self._counts_in_training == torch.is_grad_enabled()


@dataclass(frozen=True)
class PassRouting:
    """What the layers of one forward pass ask for their choices; the same again when they are recomputed."""

    sampled_tLk: Tensor | None
    replay: RouterReplay
    records: Record | None = None
    replayed: Record = field(default_factory=dict)

    def choose(self, layer: int, own_tk: Tensor) -> Tensor:
        """The experts int64 [t, k] of each token in this layer (its number, from 1), of which `own_tk` is the router's
        own choice."""
        chosen_tk = own_tk
        if self.sampled_tLk is not None:
            sampled_tk = self.sampled_tLk[:, layer - 1].long()
            is_known_t = sampled_tk[:, 0] != NONE
            if self.replay.counts:
                differs_t = (sampled_tk.sort(1).values != own_tk.sort(1).values).any(1) & is_known_t
                self.replay.differing_2.add_(torch.stack([differs_t.sum(), is_known_t.sum()]))
            if self.replay.replays_sampler:
                chosen_tk = torch.where(is_known_t[:, None], sampled_tk, own_tk)
        if self.records is not None:
            self.records[layer] = own_tk
        return self.replayed.get(layer, chosen_tk)
