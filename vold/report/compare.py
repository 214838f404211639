"""Runs side by side: where each training ended, with a standard error, whether one is clearly ahead, and configs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .read import RunRecord, flatten, group_by
from .style import CURVES, Metric, metric
from .tables import AccuracyTable, Difference, Mean

END = 0.1  # share of a run whose steps are averaged


@dataclass(frozen=True)
class EndValue:
    """A metric at the end of one run; `steps` names what it is the mean of; `best`: clearly ahead of all other runs."""

    text: str
    steps: str
    best: bool = False


class Comparison(NamedTuple):
    """Runs of one verb side by side: a row per metric or config key, its value in each run."""

    verb: str
    names: list[str]
    rows: list[tuple[Any, list]]


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Rows of Metric and EndValues, None where a run did not log it, for verbs of which two runs have metrics."""
    return _side_by_side([run for run in runs if run.metrics], _metric_rows)


def config_differences(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Rows of config key and texts, for verbs whose runs differ in some keys."""
    return _side_by_side([run for run in runs if run.config], _differing_keys)


def by_verb(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    return group_by(runs, lambda run: run.verb)


def curve_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Metrics drawn for runs of one verb: its curves, and every set they were evaluated on."""
    keys = CURVES.get(runs[0].verb, ("reward", "loss")) if runs else ()
    sets = sorted({key for run in runs for key in run.metrics if key.startswith("accuracy_")})
    return list(dict.fromkeys([*keys, *sets]))


def end_values(run: RunRecord, key: str) -> list[str]:
    """A metric at the beginning and at the end of a run, as text: means of its first and last tenth, or its first and
    last evaluation with their standard errors. One text where there is one value alone; [] where none was logged."""
    ends = _ends(run, key)
    is_evaluation = key.startswith("accuracy_")
    return [_text(mean, error if is_evaluation else math.nan, metric(key)) for mean, error in ends]


def difference_over_run(run: RunRecord, key: str) -> Difference | None:
    """The end minus the beginning, as in `end_values`; None where there are not two values."""
    ends = _ends(run, key)
    if len(ends) < 2:
        return None
    (first, first_error), (last, last_error) = ends
    return Difference(last - first, math.hypot(first_error, last_error))


def _ends(run: RunRecord, key: str) -> list[tuple[float, float]]:
    """(mean, standard error) of a metric's first and last tenth, or first and last evaluation; one of one value."""
    half = len(run.finite(key)) // 2
    ends = [end for at in (0, -1) if (end := _end(run, key, at, most=max(half, 1)))]
    return [(mean, error) for mean, error, _ in ends][: len(run.finite(key))]


def _side_by_side(runs: Sequence[RunRecord], rows_of: Callable[[Sequence[RunRecord]], list]) -> list[Comparison]:
    groups = {verb: same for verb, same in by_verb(runs).items() if len(same) > 1}
    tables = [Comparison(verb, [run.name for run in same], rows_of(same)) for verb, same in groups.items()]
    return [table for table in tables if table.rows]


def _metric_rows(runs: Sequence[RunRecord]) -> list[tuple[Metric, list[EndValue | None]]]:
    rows = [(metric(key), _end_values(runs, key)) for key in curve_keys(runs)]
    return [row for row in rows if any(row[1])]


def _differing_keys(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [
        (key, ["–" if key not in c else "null" if c[key] is None else str(c[key]) for c in configs]) for key in keys
    ]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _end_values(runs: Sequence[RunRecord], key: str) -> list[EndValue | None]:
    described = metric(key)
    ends = {run.name: end for run in runs if (end := _end(run, key))}
    signed = AccuracyTable(
        {name: {key: described.better * mean} for name, (mean, _, _) in ends.items()},
        {name: {key: error} for name, (_, error, _) in ends.items()},
    )
    best = signed.best(key) if described.better else None
    cells = {n: EndValue(_text(mean, error, described), steps, n == best) for n, (mean, error, steps) in ends.items()}
    return [cells.get(run.name) for run in runs]


def _end(run: RunRecord, key: str, at: int = -1, most: int = sys.maxsize) -> tuple[float, float, str] | None:
    """Mean, standard error, and their steps: the last tenth, steps taken as independent, or the last evaluation with
    its own error. at: 0: the first tenth, or the first evaluation. most: steps of a tenth, at least 2 else."""
    logged = run.finite(key)
    if not logged:
        return None
    if key.startswith("accuracy_"):
        step, value = logged[at]
        errors = dict(run.finite(f"stderr_{key.removeprefix('accuracy_')}"))
        return value, errors.get(step, math.nan), f"step {step:g}"
    n = min(max(2, round(END * len(logged))), most)
    values = Mean(tuple(value for _, value in (logged[-n:] if at else logged[:n])))
    n = len(values.values)
    return values.value, values.stderr, f"last {n} steps" if n > 1 else "1 step"


def _text(mean: float, error: float, described: Metric) -> str:
    """The error to two digits, and the mean to the same place: "0.618 ± 0.036"."""
    if not math.isfinite(error) or error <= 0:
        return described.format(mean)
    scale, unit = (100, " %") if described.is_share else (1, "")
    digits = max(0, 1 - math.floor(math.log10(scale * error)))
    return f"{scale * mean:.{digits}f} ± {scale * error:.{digits}f}{unit}"
