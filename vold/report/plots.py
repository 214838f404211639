"""Curves and accuracies. Raw values faint, a moving average with its standard error over them, names at line ends.

A long run is drawn as a panel can show it: a few hundred points, its extremes kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .drawing import (
    Format,
    PlainFormatter,
    drawn_range,
    figure_bytes,
    label_line_ends,
    new_figure,
    report_style,
    set_panel_title,
)
from .read import RunRecord, group_by
from .style import CURVES, INK, SOFT, arm_of, colours, format_number, metric, short_label
from .tables import AccuracyTable, Mean, as_table, seed_cells

POINTS = 240  # width of a panel in points, about
MARKS = 60  # more evaluations than these are a line with a band, not points with error bars


@report_style
def curves(runs: Sequence[RunRecord], keys: Sequence[str] = CURVES["rl"], *, fmt: Format = "svg") -> bytes:
    """Small multiples: one panel per key that any run logged, every run in its colour, three panels a row."""
    logged = [key for key in keys if any(run.finite(key) for run in runs)]
    if not logged:
        raise ValueError(f"curves: none of the runs {[run.name for run in runs]} logged any of {', '.join(keys)}")
    across = 2 if len(logged) == 4 else min(3, len(logged))
    down = math.ceil(len(logged) / across)
    figure = new_figure(3.7 * across, 2.5 * down)
    figure.get_layout_engine().set(hspace=0.08, wspace=0.05)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, key in zip(axes, logged, strict=False):
        _draw_panel(axis, runs, key)
    for axis in axes[len(logged) :]:
        axis.set_axis_off()
    return figure_bytes(figure, fmt)


def curve(runs: Sequence[RunRecord], key: str, *, fmt: Format = "svg") -> bytes:
    """One panel of `curves`."""
    return curves(runs, [key], fmt=fmt)


@report_style
def accuracy_bars(table: AccuracyTable | Mapping[str, Any], sets: Sequence[str] = (), *, fmt: Format = "svg") -> bytes:
    """One row of panels, a panel per set (by default all), a bar per model; error bars are ± one standard error."""
    table = as_table(table)
    sets = sets or table.sets
    if not sets:
        raise ValueError("accuracy_bars: the table has no accuracy; give {model: {set: accuracy}}")
    paint = colours(table.models)
    ends = [table.value(m, s) + np.nan_to_num(table.error(m, s)) for m in table.models for s in table.sets]
    figure, axes = _set_panels(table.models, sets, row_height=0.38)
    for axis, name in zip(axes, sets, strict=True):
        values = [100 * table.value(model, name) for model in table.models]
        errors = [100 * table.error(model, name) or math.nan for model in table.models]  # NaN: no whisker
        whiskers = {"color": INK, "ecolor": INK, "elinewidth": 1.2, "capsize": 3}
        bars = axis.barh(range(len(values)), values, 0.62, xerr=errors, color=paint.values(), error_kw=whiskers)
        axis.bar_label(bars, fmt="%.1f", padding=5, color=INK)
        for y, value in enumerate(values):
            if not math.isfinite(value):
                axis.text(0, y, " not measured", color=SOFT, va="center", fontsize=8.5)
        most = 100 * max(filter(math.isfinite, ends), default=1.0) or 1.0
        axis.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, most) if tick <= 100])
        axis.spines["bottom"].set_visible(False)
        axis.set_xlim(0, 1.18 * most)  # with the numbers at the ends of the bars
    return figure_bytes(figure, fmt)


@report_style
def seeds_errorbars(rows: Sequence[Mapping[str, Any]], *, fmt: Format = "svg") -> bytes:
    """Every seed a dot, the mean a diamond, error bars ± one standard error over seeds; a panel per set."""
    cells = seed_cells(rows)
    sets, paint = as_table(cells).sets, colours(list(cells))
    if not sets:
        raise ValueError(f"seeds_errorbars: no accuracy in {len(rows)} rows; give rows of arm, seed, text, image")
    figure, axes = _set_panels(list(cells), sets, row_height=0.42)
    for axis, name in zip(axes, sets, strict=True):
        for y, (arm, row) in enumerate(cells.items()):
            if name in row:
                draw_seeds(axis, y, row[name], paint[arm])
        low, high = (min(max(end / 100, 0.0), 1.0) for end in axis.dataLim.intervalx)
        axis.set_xlim(*(100 * end for end in drawn_range(low, high, share=True)))
        axis.xaxis.set_major_locator(MaxNLocator(4))
    return figure_bytes(figure, fmt)


def _set_panels(models: Sequence[str], sets: Sequence[str], *, row_height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure(2.9 * len(sets) + 0.5, row_height * len(models) + 0.9)
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, sets, strict=True):
        axis.set_title(f"{short_label(name)}, % correct", fontsize=9.5)
        axis.set_yticks(range(len(models)), [short_label(model) for model in models], color=INK)
        axis.xaxis.grid(True)
    axes[0].set_ylim(len(models) - 0.5, -0.5)
    return figure, axes


def draw_seeds(axis: Axes, y: float, mean: Mean, colour: str) -> None:
    """Draw one row: a dot per seed, the mean with its standard error."""
    values = 100 * np.asarray(mean.values)
    offsets = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.zeros(1)
    axis.plot(values, y + offsets, "o", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0)
    axis.errorbar(100 * mean.value, y, xerr=np.nan_to_num(100 * mean.stderr), color=INK, linewidth=1.2, capsize=3)
    axis.plot(100 * mean.value, y, "D", color=colour, markersize=6.5)


# -- curves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trend:
    """A line with its standard error: three arrays of equal length, NaN where there is no value."""

    x: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray

    def thinned(self) -> Trend:
        """At most POINTS points of a line that is smooth already; the last one stays."""
        logged = np.flatnonzero(np.isfinite(self.mean))
        kept = np.union1d(logged[:: -(-len(logged) // POINTS) or 1], logged[-1:])
        return Trend(self.x[kept], self.mean[kept], self.stderr[kept])


def trend(run: RunRecord, key: str) -> Trend:
    """Centred moving average over about a twelfth of the run, with its standard error from the scatter of the steps in
    each window, taken as independent. NaN stays NaN and is not averaged in."""
    y = np.asarray(run.metrics[key], dtype=float)
    logged = np.isfinite(y)
    half = max(1, len(y) // 24)
    level = y[logged].mean() if logged.any() else 0.0  # sums of what is left lose no digits
    deviations = np.where(logged, y - level, 0.0)
    window = np.ones(2 * half + 1)  # fewer neighbours at the ends
    n, total, squares = (np.convolve(v, window)[half:-half] for v in (logged, deviations, deviations**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        stderr = np.sqrt(np.maximum(squares - total * mean, 0.0) / (n - 1) / n)
    return Trend(np.asarray(run.steps), np.where(logged, level + mean, np.nan), np.where(logged, stderr, np.nan))


def trend_of_seeds(runs: Sequence[RunRecord], key: str) -> Trend:
    """The mean over runs of their moving averages, at the steps that all of them logged, with its standard error over
    the runs. Sparse evaluations are not averaged over steps."""
    dense = all(_dense(run, key) for run in runs)
    lines = [dict(zip(run.steps, trend(run, key).mean if dense else run.metrics[key], strict=True)) for run in runs]
    steps = sorted(step for step in lines[0] if all(math.isfinite(line.get(step, math.nan)) for line in lines))
    values = np.array([[line[step] for step in steps] for line in lines])
    return Trend(np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(runs)))


def extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 × POINTS points of a line that look like all of them: the lowest and highest of each stretch."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) <= 2 * POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(y)), POINTS)
    kept = np.unique([s[select(y[s])] for s in stretches for select in (np.argmin, np.argmax)])
    return x[kept], y[kept]


def _dense(run: RunRecord, key: str) -> bool:
    """Return whether a metric is a line, logged on most steps or often, and not points of sparse evaluations."""
    logged = len(run.finite(key))
    return logged > MARKS or (not key.startswith("accuracy_") and logged * 2 >= len(run.steps))


def _draw_panel(axis: Axes, runs: Sequence[RunRecord], key: str) -> None:
    described, paint = metric(key), colours([run.name for run in runs])
    ends: list[tuple[float, float, str, str]] = []
    logged = [run for run in runs if run.finite(key)]
    # the runs of one arm in several folders (seed0/vold, seed1/vold) go under the arm's name
    for name, group in group_by(logged, lambda run: arm_of(run.name) if "/" in run.name else run.name).items():
        colour = paint[group[0].name]
        draw = _draw_arm if len(group) > 1 else _draw_run
        ends.append((*draw(axis, group, key, colour), short_label(name, 14), colour))
    values = [value for run in logged for _, value in run.finite(key)]
    set_panel_title(axis, described.label, described.unit)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    if described.log and values and min(values) > 0 and max(values) / min(values) > 20:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    else:
        low, high = axis.dataLim.intervaly if values else (0.0, 1.0)
        if described.is_share:  # error bars and bands may reach beyond what a share can be
            low, high = min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)
        axis.set_ylim(*drawn_range(low, high, share=described.is_share))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_formatter(PlainFormatter(share=described.is_share))
    axis.yaxis.grid(True)
    label_line_ends(axis, ends)


def _draw_run(axis: Axes, runs: Sequence[RunRecord], key: str, colour: str) -> tuple[float, float]:
    """Draw a single run; return the end of its line."""
    (run,) = runs
    x, y = np.asarray(run.steps), np.asarray(run.metrics[key], dtype=float)
    if _dense(run, key):
        axis.plot(*extremes(x, y), color=colour, linewidth=0.9, alpha=0.35)
        return _draw_trend(axis, trend(run, key), colour)
    logged = np.isfinite(y)
    error = run.metrics.get(f"stderr_{key.removeprefix('accuracy_')}")
    stderr = np.maximum(np.nan_to_num(np.asarray(error, dtype=float)[logged]), 0.0) if error else None
    axis.errorbar(x[logged], y[logged], yerr=stderr, color=colour, linewidth=1.6, elinewidth=1, fmt="-o", markersize=4)
    if run.best and run.best[0] == key:
        best = x == run.best[1]
        star = {"markeredgecolor": INK, "markeredgewidth": 0.7, "markersize": 12, "zorder": 3}
        axis.plot(x[best], y[best], "*", color=colour, **star)
    return float(x[logged][-1]), float(y[logged][-1])


def _draw_arm(axis: Axes, runs: Sequence[RunRecord], key: str, colour: str) -> tuple[float, float]:
    """Draw one arm of several seeds: each faint and unnamed, their mean with its standard error over it."""
    for run in runs:
        values = np.asarray(run.metrics[key], dtype=float)
        dense = _dense(run, key)
        line = trend(run, key) if dense else Trend(np.asarray(run.steps), values, np.full(len(values), np.nan))
        line = line.thinned()
        axis.plot(line.x, line.mean, color=colour, linewidth=0.7, alpha=0.3, marker="" if dense else ".")
    mean = trend_of_seeds(runs, key)
    if not len(mean.x):  # no step that all of them logged: their own lines are all there is
        return float(line.x[-1]), float(line.mean[-1])
    return _draw_trend(axis, mean, colour)


def _draw_trend(axis: Axes, line: Trend, colour: str) -> tuple[float, float]:
    line = line.thinned()
    band = np.nan_to_num(line.stderr)
    axis.fill_between(line.x, line.mean - band, line.mean + band, color=colour, alpha=0.18, linewidth=0)
    axis.plot(line.x, line.mean, color=colour, linewidth=2, solid_capstyle="round")
    return float(line.x[-1]), float(line.mean[-1])
