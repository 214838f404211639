"""Watches a stage's steps for `vold profile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vold.run.timers import Interval


class StepProfiler:
    """Told after every step; keeps this rank's rows of metrics and its intervals, and moves torch's profiler along its
    schedule."""

    def __init__(self, tracer: torch.profiler.profile):
        self.rows: list[dict[str, float]] = []
        self.intervals: list[Sequence[Interval]] = []  # of each row's step
        self._tracer = tracer

    def step(self, row: dict[str, float], intervals: Sequence[Interval]) -> None:
        self.rows.append(row)
        self.intervals.append(intervals)
        self._tracer.step()
