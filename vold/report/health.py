"""Vital signs of a run: where its time went, and each health metric against its limit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .read import RunRecord, as_number
from .style import HEALTH, PALETTE, PHASES, TRAIN_PARTS, Metric, colours, label, metric


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    share: float
    colour: str


@dataclass(frozen=True)
class Vital:
    """One metric of one run: median, worst (the highest; the lowest where it has a least), last, and the points of a
    sparkline."""

    median: float
    worst: float
    last: float
    over: int  # steps on the wrong side of the limit
    steps: int
    spark: str  # "x,y x,y …" in a box of 100 × 24

    @property
    def flagged(self) -> bool:
        return self.over > 0


@dataclass(frozen=True)
class VitalRow:
    key: str
    metric: Metric
    vitals: Mapping[str, Vital | None]  # run name -> its numbers


def phases(run: RunRecord) -> list[Phase]:
    """Seconds per phase over the whole run, in the order of a step; what no phase claims is "other"."""
    totals = {
        key.removeprefix("seconds_"): _total(values)
        for key, values in run.metrics.items()
        if key.startswith("seconds_") and key.removeprefix("seconds_") not in TRAIN_PARTS and _total(values) > 0
    }
    whole = _total(run.metrics.get("seconds", ()))
    name = "other" if totals else "step"
    if (rest := whole - sum(totals.values())) > 0.005 * whole:
        totals[name] = rest
    return as_phases(totals)


def as_phases(seconds: Mapping[str, float]) -> list[Phase]:
    """{name: seconds} -> phases with their share of the sum."""
    known = [name for name in PHASES if name in seconds]
    order = known + [name for name in seconds if name not in known]
    kept = {name: as_number(seconds[name]) for name in order}
    kept = {name: value for name, value in kept.items() if math.isfinite(value) and value > 0}
    whole = sum(kept.values())
    paint = phase_colours(list(kept))
    return [Phase(name, value, value / whole, paint[name]) for name, value in kept.items()]


def phase_colours(names: Sequence[str]) -> dict[str, str]:
    """CSS variables: a phase of a step has one colour on every bar, a phase that is a run has the run's."""
    arms = [name for name in names if label(name) != name]
    paint = {name: f"--run-{PALETTE.index(colour)}" for name, colour in colours(arms).items()}
    paint |= {name: f"--phase-{PHASES.index(name)}" for name in names if name in PHASES}
    rest = [name for name in names if name not in paint]
    return paint | {name: f"--phase-{i % len(PHASES)}" for i, name in enumerate(rest)}


def vitals(runs: Sequence[RunRecord]) -> list[VitalRow]:
    """A row per health metric that any of the runs logged."""
    rows = [VitalRow(key, metric(key), {run.name: vital(run, key) for run in runs}) for key in HEALTH]
    return [row for row in rows if any(row.vitals.values())]


def vital(run: RunRecord, key: str) -> Vital | None:
    """None where the run never logged `key`."""
    values = [value for value in run.metrics.get(key, ()) if math.isfinite(value)]
    if not values:
        return None
    shown = metric(key)
    over = sum(map(shown.is_over, values))
    worst = min(values) if shown.least is not None else max(values)
    return Vital(statistics.median(values), worst, values[-1], over, len(values), spark(values))


def alarms(run: RunRecord, *, last: int) -> list[str]:
    """A line for each metric that was beyond its limit, or not finite, on one of the last steps."""
    found = []
    for key in HEALTH:
        shown, steps = metric(key), run.metrics.get(key, [])[-last:]
        if beyond := [value for value in steps if shown.is_over(value)]:
            now = f"{shown.label}: {amount(beyond[-1], shown)}, healthy {limit_text(shown)}"
            found.append(f"{now}, on {len(beyond)} of the last {len(steps)} steps. Look at: {shown.remedy}")
    return found + [
        f"{metric(key).label}: not finite on one of the last {last} steps" for key in unfinite(run, last=last)
    ]


def limit_text(shown: Metric) -> str:
    """As a person reads it: ≤ 10 %, ≥ 50 %, – where there is none."""
    if shown.limit is not None:
        return f"≤ {amount(shown.limit, shown)}"
    return f"≥ {amount(shown.least, shown)}" if shown.least is not None else "–"


def unfinite(run: RunRecord, *, last: int = 0) -> list[str]:
    """Keys that a run logs every step but that were not finite on some: the first sign of a broken run. `last`: only of
    so many steps; 0: of all."""
    dense = ("loss", "pg_loss", "kl_loss", "grad_norm", "reward", "entropy")
    return [key for key in dense if any(not math.isfinite(value) for value in run.metrics.get(key, ())[-last:])]


def spark(values: Sequence[float], *, width: float = 100, height: float = 24) -> str:
    """SVG polyline points, at most one per horizontal unit, over the values' own range."""
    stride = max(1, len(values) // int(width))
    kept = list(values[::stride])
    low, high = min(kept), max(kept)
    span = (high - low) or 1.0
    across = width / max(1, len(kept) - 1)
    level = 0.5 if high == low else None
    ys = (level if level is not None else (value - low) / span for value in kept)
    return " ".join(f"{i * across:.1f},{height - 2 - y * (height - 4):.1f}" for i, y in enumerate(ys))


def number(value: float) -> str:
    """Three significant figures, without an exponent where a person would not use one."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"


def amount(value: float, shown: Metric) -> str:
    """`number`, but a share as percent."""
    return f"{number(round(100 * value, 1))} %" if shown.is_share else number(value)


def duration(seconds: float) -> str:
    """7.3 s, 4 min 10 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _total(values: Sequence[float]) -> float:
    return sum(value for value in values if math.isfinite(value))
