"""The record of a stage's steps that `vold profile` evaluates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vold.run.timers import Interval


class StepProfiler:
    """Keeps this rank's metrics and intervals of every step, and moves torch's profiler along its schedule."""

    def __init__(self, tracer: torch.profiler.profile):
        self.rows: list[dict[str, float]] = []
        self.intervals: list[Sequence[Interval]] = []  # one entry a step, parallel to rows
        self._tracer = tracer

    def step(self, row: dict[str, float], intervals: Sequence[Interval]) -> None:
        """Record one finished step."""
        self.rows.append(row)
        self.intervals.append(intervals)
        self._tracer.step()
