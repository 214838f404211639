"""How beta, the weight of the distillation term, changes from step to step.

A schedule keeps nothing: it is a function of the step and of the row that the step before wrote to metrics.jsonl, so
a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Schedule = Callable[[float, int, Mapping[str, float]], float]
"""(first beta, 0-based step, metrics of the step before or {}) -> beta of this step"""


def constant(beta: float, step: int, last: Mapping[str, float]) -> float:
    return beta


@dataclass(frozen=True)
class Linear:
    """From the first beta to `end`, `by` a step (KDRL: 5e-3 to 1e-3 by 5e-5)."""

    end: float
    by: float

    def __call__(self, beta: float, step: int, last: Mapping[str, float]) -> float:
        left = max(abs(beta - self.end) - self.by * step, 0.0)
        return self.end + math.copysign(left, beta - self.end)


@dataclass(frozen=True)
class TargetKL:
    """Proportional controller (Ziegler et al. 2019, section 2.2): beta grows while the measured KL to the teacher is
    above `target` (nats a token, k2 estimate) and shrinks below, by at most a fiftieth a step. Where a step measured no
    KL, beta stays."""

    target: float
    gain: float = 0.1
    most: float = 0.2  # relative errors beyond count as this

    def __call__(self, beta: float, step: int, last: Mapping[str, float]) -> float:
        before, kl = last.get("beta", beta), last.get("kl_teacher", math.nan)
        if not math.isfinite(kl):
            return before
        error = min(max(kl / self.target - 1.0, -self.most), self.most)
        return before * (1.0 + self.gain * error)
