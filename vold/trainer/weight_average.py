"""The exponential moving average of the student's weights, divided over ranks as the student is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vold.models.language_model import LanguageModel


class WeightAverage:
    """An exponential moving average of weights: average += rate * (student - average) after every step.

    chunks: a copy of the student's chunks; their weights become the average. What the student does not train (behind
    adapters) is held once, by the student. fp32: the average of each trained parameter in fp32, in which it
    accumulates: a twentieth of a step's change would round to nothing in bf16.
    """

    def __init__(self, chunks: Sequence[LanguageModel], rate: float, student: Sequence[LanguageModel]):
        self.chunks, self._rate = list(chunks), rate
        self.fp32: dict[nn.Parameter, Tensor] = {}
        for average, current in self._pairs(student):
            if average.requires_grad:
                self.fp32[average] = average.data.float()
            else:
                average.data = current.data
                if hasattr(current, "quantised"):
                    average.quantised = current.quantised  # pyright: ignore[reportAttributeAccessIssue]
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()

    def _pairs(self, student: Sequence[LanguageModel]) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for average_chunk, student_chunk in zip(self.chunks, student, strict=True):
            yield from zip(average_chunk.parameters(), student_chunk.parameters(), strict=True)

    @torch.no_grad()
    def update(self, student: Sequence[LanguageModel]) -> None:
        """Move the average towards the student's current weights."""
        for average, current in self._pairs(student):
            if average in self.fp32:
                self.set(average, self.fp32[average].lerp(current.float(), self._rate))

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace the average of one parameter of `chunks` by an fp32 value of its shape."""
        self.fp32[parameter].copy_(value)
        parameter.copy_(value)
