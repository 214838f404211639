"""The health of a run: where its time went, and each health metric against its healthy range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .read import RunRecord, as_number
from .style import HEALTH, PHASES, TRAIN_PARTS, Metric, metric, ordered, phase_colours


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    share: float
    colour: str


def phases(run: RunRecord) -> list[Phase]:
    """Seconds per phase over the whole run, in the order of a step; time outside every phase is "other"."""
    totals = {
        name: seconds
        for key in run.metrics
        if key.startswith("seconds_") and (name := key.removeprefix("seconds_")) not in TRAIN_PARTS
        if (seconds := sum(value for _, value in run.finite(key))) > 0
    }
    run_seconds = sum(value for _, value in run.finite("seconds"))
    other = run_seconds - sum(totals.values())
    return as_phases(totals | ({"other" if totals else "step": other} if other > 0.005 * run_seconds else {}))


def as_phases(seconds: Mapping[str, float]) -> list[Phase]:
    """{name: seconds} as phases with their share of the sum, the known ones in the order of a step."""
    numbers = {name: as_number(seconds[name]) for name in ordered(seconds, PHASES)}
    kept = {name: value for name, value in numbers.items() if math.isfinite(value) and value > 0}
    total, colours = sum(kept.values()), phase_colours(list(kept))
    return [Phase(name, value, value / total, colours[name]) for name, value in kept.items()]


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one run. worst: the highest value, or the lowest where the metric has a healthy minimum."""

    median: float
    worst: float
    last: float
    beyond: int  # steps outside the healthy range
    steps: int
    sparkline: str  # SVG polyline points in a box of 100 × 24


def summarise(run: RunRecord, key: str) -> MetricSummary | None:
    """Summarise a metric over the run; None where the run never logged it."""
    values = [value for _, value in run.finite(key)]
    if not values:
        return None
    described = metric(key)
    worst = max(values) if described.healthy_min is None else min(values)
    beyond = sum(map(described.is_unhealthy, values))
    return MetricSummary(statistics.median(values), worst, values[-1], beyond, len(values), _polyline(values))


def health_table(runs: Sequence[RunRecord]) -> list[tuple[Metric, dict[str, MetricSummary | None]]]:
    """A row per health metric that any of the runs logged: run name -> its summary."""
    rows = [(metric(key), {run.name: summarise(run, key) for run in runs}) for key in HEALTH]
    return [row for row in rows if any(row[1].values())]


def health_warnings(run: RunRecord, *, last: int) -> list[str]:
    """A line for each metric that was outside its healthy range, or not finite, on one of the last steps."""
    lines = []
    for key in HEALTH:
        described, values = metric(key), run.metrics.get(key, [])[-last:]
        if beyond := [value for value in values if described.is_unhealthy(value)]:
            lines.append(
                f"{described.label}: {described.format(beyond[-1])}, healthy {described.limit}, "
                f"on {len(beyond)} of the last {len(values)} steps. Look at: {described.advice}"
            )
    return lines + [
        f"{metric(key).label}: not finite on one of the last {last} steps" for key in keys_not_finite(run, last=last)
    ]


def keys_not_finite(run: RunRecord, *, last: int = 0) -> list[str]:
    """Keys logged every step that were not finite on some of the last `last` steps (0: of all): the first sign of a
    broken run."""
    dense = ("loss", "pg_loss", "kl_loss", "grad_norm", "reward", "entropy")
    return [key for key in dense if not all(map(math.isfinite, run.metrics.get(key, ())[-last:]))]


def _polyline(values: Sequence[float]) -> str:
    """SVG polyline points, at most about one per horizontal unit, over the values' own range."""
    kept = values[:: max(1, len(values) // 100)]
    low, span, across = min(kept), max(kept) - min(kept), 100 / max(1, len(kept) - 1)
    ys = [(value - low) / span if span else 0.5 for value in kept]
    return " ".join(f"{i * across:.1f},{22 - 20 * y:.1f}" for i, y in enumerate(ys))
