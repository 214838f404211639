"""Training runs side by side: where each ended, with a standard error, and whether one is clearly ahead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .health import amount
from .read import RunRecord
from .style import CURVES, Metric, metric
from .tables import AccuracyTable

ENDING = 0.1  # of a run: its last steps are averaged


@dataclass(frozen=True)
class Ending:
    """A metric at the end of one run. `text`: with its standard error; `best`: clearly ahead of every other run."""

    text: str
    steps: str  # what it is a mean of
    best: bool = False


@dataclass(frozen=True)
class Comparison:
    """Runs of one verb: a row per metric, an Ending per run, None where a run did not log it."""

    verb: str
    names: list[str]
    rows: list[tuple[Metric, list[Ending | None]]]


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """One table for each verb of which there are at least two runs with metrics."""
    found = []
    for verb in dict.fromkeys(run.verb for run in runs):
        same = [run for run in runs if run.verb == verb and run.metrics]
        if len(same) > 1 and (rows := [row for key in keys_of(same) if (row := _row(same, key))]):
            found.append(Comparison(verb, [run.name for run in same], rows))
    return found


def keys_of(runs: Sequence[RunRecord]) -> list[str]:
    """What is shown of runs of one verb: its curves, and every set they were evaluated on."""
    wanted = CURVES.get(runs[0].verb, ("reward", "loss")) if runs else ()
    sets = sorted({key for run in runs for key in run.metrics if key.startswith("accuracy_")})
    return list(dict.fromkeys([*wanted, *sets]))


def _row(runs: Sequence[RunRecord], key: str) -> tuple[Metric, list[Ending | None]] | None:
    shown = metric(key)
    ends = {run.name: end for run in runs if (end := _end(run, key))}
    if not ends:
        return None
    signed = AccuracyTable(
        {name: {key: shown.better * mean} for name, (mean, _, _) in ends.items()},
        {name: {key: error} for name, (_, error, _) in ends.items()},
    )
    best = signed.best(key) if shown.better else None
    cells = [
        Ending(_text(*ends[run.name][:2], shown), ends[run.name][2], best == run.name) if run.name in ends else None
        for run in runs
    ]
    return shown, cells


def _end(run: RunRecord, key: str) -> tuple[float, float, str] | None:
    """Mean, standard error, and what they are of: the last tenth's steps taken as independent, or the last evaluation
    with its own."""
    logged = [(step, value) for step, value in zip(run.steps, run.metrics.get(key, ()), strict=False)]
    logged = [(step, value) for step, value in logged if math.isfinite(value)]
    if not logged:
        return None
    if key.startswith("accuracy_"):
        step, value = logged[-1]
        errors = dict(zip(run.steps, run.metrics.get(f"stderr_{key.removeprefix('accuracy_')}", ()), strict=False))
        return value, errors.get(step, math.nan), f"step {step:g}"
    values = [value for _, value in logged[-max(2, round(ENDING * len(logged))) :]]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error, f"last {len(values)} steps" if len(values) > 1 else "1 step"


def _text(mean: float, error: float, shown: Metric) -> str:
    """The error to two digits, and the mean to the same place: "0.618 ± 0.036"."""
    if not math.isfinite(error) or error <= 0:
        return amount(mean, shown)
    share = 100 if shown.is_share else 1
    places = max(0, 1 - math.floor(math.log10(share * error)))
    return f"{share * mean:.{places}f} ± {share * error:.{places}f}{' %' if shown.is_share else ''}"
