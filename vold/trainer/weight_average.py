"""The student's exponential moving average, divided over ranks as the student is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vold.models.language_model import LanguageModel


class WeightAverage:
    """`chunks`, of the student's layout and weights, become its average: w += rate (student - w) after every step.
    Accumulated in fp32: in bf16 a twentieth of a step's change would round to nothing."""

    def __init__(self, chunks: Sequence[LanguageModel], rate: float):
        self.chunks, self._rate = list(chunks), rate
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        self.exact: dict[nn.Parameter, Tensor] = {
            p: p.data.float() for chunk in self.chunks for p in chunk.parameters()
        }

    @torch.no_grad()
    def follow(self, student: Sequence[LanguageModel]) -> None:
        for mine, theirs in zip(self.chunks, student, strict=True):
            for parameter, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                self.put(parameter, self.exact[parameter].lerp(new.float(), self._rate))

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """`value` as the average of this parameter, from a checkpoint too."""
        self.exact[parameter].copy_(value)
        parameter.copy_(value)
