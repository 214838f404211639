"""Watches a stage's steps for `vold profile`."""

from __future__ import annotations

import torch


class StepProfiler:
    """Told after every step; keeps this rank's rows of metrics and moves torch's profiler along its schedule."""

    def __init__(self, tracer: torch.profiler.profile):
        self.rows: list[dict[str, float]] = []
        self._tracer = tracer

    def step(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self._tracer.step()
