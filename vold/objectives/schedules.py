"""Schedules of beta, the weight of the KL term, over the steps of a run.

A schedule has no state: it is a function of the step and of the metrics of the step before, which a checkpoint keeps,
so a resumed run continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Schedule = Callable[[float, int, Mapping[str, float]], float]
"""(beta of the first step, 0-based step, metrics of the step before or {}) -> beta of this step"""


def constant(beta: float, step: int, last: Mapping[str, float]) -> float:
    """The first step's beta."""
    return beta


@dataclass(frozen=True)
class Linear:
    """Changes beta from its first value to `end` by `step_size` a step (KDRL: 5e-3 to 1e-3 by 5e-5)."""

    end: float
    step_size: float

    def __call__(self, beta: float, step: int, last: Mapping[str, float]) -> float:
        distance = max(abs(beta - self.end) - self.step_size * step, 0.0)
        return self.end + math.copysign(distance, beta - self.end)


@dataclass(frozen=True)
class TargetKL:
    """Proportional controller (Ziegler et al. 2019, section 2.2): beta grows while the measured KL to the teacher is
    above `target` (nats per token, k2 estimate) and shrinks below it, by at most 2 % a step. Where a step measured no
    KL, beta stays."""

    target: float
    gain: float = 0.1
    max_error: float = 0.2  # relative errors are clipped to +- this

    def __call__(self, beta: float, step: int, last: Mapping[str, float]) -> float:
        previous, kl = last.get("beta", beta), last.get("kl_teacher", math.nan)
        if not math.isfinite(kl):
            return previous
        error = min(max(kl / self.target - 1.0, -self.max_error), self.max_error)
        return previous * (1.0 + self.gain * error)
