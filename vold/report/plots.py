"""Figures as self-contained SVG or PNG bytes. Raw values faint, a moving average with its standard error over them,
labels at lines. A long run is drawn as what a panel can show of it: a few hundred points, its extremes kept."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .read import RunRecord
from .style import CURVES, GRID, INK, SOFT, arm_of, colours, label, metric
from .tables import AccuracyTable, as_table, seed_cells

Format = Literal["svg", "png"]
_RC = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "vold",  # the same figure gives the same bytes
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,  # names and labels are text, never TeX
}
POINTS = 240  # a panel is about as many points wide
MARKS = 60  # more evaluations than these are a line with a band, not points with whiskers
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def curves(runs: Sequence[RunRecord], keys: Sequence[str] = CURVES["rl"], *, fmt: Format = "svg") -> bytes:
    """Small multiples: one panel per key that any run logged, every run in its colour, three panels a row."""
    keys = [key for key in keys if any(has(run, key) for run in runs)]
    if not keys:
        raise ValueError(f"curves: none of the runs {[run.name for run in runs]} logged any of the keys asked for")
    across = 2 if len(keys) == 4 else min(3, len(keys))
    down = math.ceil(len(keys) / across)
    with matplotlib.rc_context(_RC):
        figure = _figure(3.7 * across, 2.5 * down)
        figure.get_layout_engine().set(hspace=0.08, wspace=0.05)
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, key in zip(axes, keys, strict=False):
            _draw_panel(axis, runs, key)
        for axis in axes[len(keys) :]:
            axis.set_axis_off()
        return _bytes(figure, fmt)


def curve(runs: Sequence[RunRecord], key: str, *, fmt: Format = "svg") -> bytes:
    """One panel of `curves`."""
    with matplotlib.rc_context(_RC):
        figure = _figure(3.7, 2.5)
        _draw_panel(figure.subplots(), runs, key)
        return _bytes(figure, fmt)


def accuracy_bars(table: AccuracyTable | Mapping[str, Any], *, fmt: Format = "svg") -> bytes:
    """One row of panels, a panel per set, a bar per model; whiskers are ± one standard error."""
    table = as_table(table)
    models, paint = table.models, colours(table.models)
    if not table.sets:
        raise ValueError("accuracy_bars: the table has no accuracy; give {model: {set: accuracy}}")
    top = max((table.value(m, s) + _zero(table.error(m, s)) for m in models for s in table.sets), default=1.0)
    with matplotlib.rc_context(_RC):
        figure = _figure(2.9 * len(table.sets) + 0.5, 0.38 * len(models) + 0.9)
        axes = figure.subplots(1, len(table.sets), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, table.sets, strict=True):
            values = [table.value(model, name) for model in models]
            errors = [table.error(model, name) for model in models]
            _draw_bars(axis, values, errors, [paint[model] for model in models])
            axis.set_yticks(range(len(models)), [_short(model) for model in models], color=INK)
            axis.set_title(f"{_short(name)}, % correct", loc="left", fontsize=9.5, fontweight="bold")
            axis.set_xlim(0, 118 * _zero(top) or 1)
        axes[0].invert_yaxis()
        return _bytes(figure, fmt)


def seeds_errorbars(rows: Sequence[Mapping[str, Any]], *, fmt: Format = "svg") -> bytes:
    """Every seed a dot, the mean a bar, whiskers ± one standard error over seeds; a panel per set."""
    cells = seed_cells(rows)
    sets, paint = as_table(cells).sets, colours(list(cells))
    if not sets:
        raise ValueError(f"seeds_errorbars: no accuracy in {len(rows)} rows; give rows of arm, seed, text, image")
    with matplotlib.rc_context(_RC):
        figure = _figure(2.9 * len(sets) + 0.5, 0.42 * len(cells) + 0.9)
        axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, sets, strict=True):
            for y, (arm, row) in enumerate(cells.items()):
                if name in row:
                    _draw_seeds(axis, y, row[name], paint[arm])
            axis.set_yticks(range(len(cells)), [_short(arm) for arm in cells], color=INK)
            axis.set_title(f"{_short(name)}, % correct", loc="left", fontsize=9.5, fontweight="bold")
            axis.xaxis.grid(True, color=GRID, linewidth=0.8)
            axis.margins(x=0.12)
        axes[0].set_ylim(len(cells) - 0.5, -0.5)
        return _bytes(figure, fmt)


def has(run: RunRecord, key: str) -> bool:
    """Whether the run logged at least one finite value under `key`."""
    return any(math.isfinite(value) for value in run.metrics.get(key, ()))


def seed_groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of one arm in several folders (seed0/vold, seed1/vold) belong together, under the arm's name."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(arm_of(run.name) if "/" in run.name else run.name, []).append(run)
    return groups


@dataclass(frozen=True)
class Trend:
    """A line with its standard error: three arrays of equal length, NaN where there is nothing."""

    x: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray


def trend(run: RunRecord, key: str) -> Trend:
    """Centred moving average over about a twelfth of the run, and its standard error from the scatter of the steps in
    each window, taken as independent. NaN stays NaN and is not averaged in."""
    y = np.asarray(run.metrics[key], dtype=float)
    logged = np.isfinite(y)
    half = max(1, len(y) // 24)
    level = y[logged].mean() if logged.any() else 0.0  # sums of what is left lose no digits
    rest = np.where(logged, y - level, 0.0)
    n, total, squares = (_window(values, half) for values in (logged.astype(float), rest, rest**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        variance = np.maximum(squares - total * mean, 0.0) / (n - 1)
        stderr = np.sqrt(variance / n)
    return Trend(np.asarray(run.steps), np.where(logged, level + mean, np.nan), np.where(logged, stderr, np.nan))


def trend_of_seeds(runs: Sequence[RunRecord], key: str) -> Trend:
    """The mean over runs of their moving averages, at the steps that all of them logged, and its standard error over
    the runs. What is evaluated now and then is not averaged over steps."""
    dense = all(_dense(run, key) for run in runs)
    lines = [
        {step: value for step, value in zip(run.steps, values, strict=True) if math.isfinite(value)}
        for run in runs
        for values in [trend(run, key).mean if dense else run.metrics[key]]
    ]
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    values = np.array([[line[step] for step in steps] for line in lines])
    return Trend(np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(runs)))


def _as_logged(run: RunRecord, key: str) -> Trend:
    y = np.asarray(run.metrics[key], dtype=float)
    return Trend(np.asarray(run.steps), y, np.full(len(y), np.nan))


def _window(values: np.ndarray, half: int) -> np.ndarray:
    """Sum over the `half` neighbours on either side and the value itself; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    return sums[np.minimum(ends + half + 1, len(values))] - sums[np.maximum(ends - half, 0)]


def _dense(run: RunRecord, key: str) -> bool:
    """Logged on most steps, or often; else it is an evaluation now and then, to be shown as points."""
    logged = sum(map(math.isfinite, run.metrics[key]))
    return logged > MARKS or (not key.startswith("accuracy_") and logged * 2 >= len(run.steps))


def extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 × POINTS points of a line that look like all of them: the lowest and the highest of each stretch."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) <= 2 * POINTS:
        return x, y
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(y)), POINTS):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    order = sorted(kept)
    return x[order], y[order]


def _thin(line: Trend) -> Trend:
    """At most POINTS points of a line that is smooth already; the last one stays."""
    logged = np.flatnonzero(np.isfinite(line.mean))
    kept = np.union1d(logged[:: -(-len(logged) // POINTS) or 1], logged[-1:])
    return Trend(line.x[kept], line.mean[kept], line.stderr[kept])


def _short(name: str) -> str:
    """A label that leaves room for the figure."""
    return label(name) if len(name) <= 24 else f"{name[:12]}…{name[-10:]}"


def _zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_panel(axis: Axes, runs: Sequence[RunRecord], key: str) -> None:
    shown, paint = metric(key), colours([run.name for run in runs])
    ends: list[tuple[float, float, str, str]] = []
    for name, group in seed_groups([run for run in runs if has(run, key)]).items():
        colour = paint[group[0].name]
        x, y = _draw_seeds_run(axis, group, key, colour) if len(group) > 1 else _draw_run(axis, group[0], key, colour)
        ends.append((x, y, _short(name), colour))
    every = [v for run in runs for v in run.metrics.get(key, ()) if math.isfinite(v)]
    if shown.log and every and min(every) > 0 and max(every) / min(every) > 20:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title(shown.label, loc="left", fontsize=10.5, fontweight="bold", pad=16)
    axis.text(0, 1.035, shown.unit, transform=axis.transAxes, color=SOFT, fontsize=8.5, va="bottom")
    axis.set_xlabel("step", loc="left", fontsize=8.5)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    if axis.get_yscale() == "linear":
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    axis.yaxis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    _label_ends(axis, ends)


def _draw_run(axis: Axes, run: RunRecord, key: str, colour: str) -> tuple[float, float]:
    """Draw one run; give the point where its line ends."""
    x, y = np.asarray(run.steps), np.asarray(run.metrics[key], dtype=float)
    if _dense(run, key):
        axis.plot(*extremes(x, y), color=colour, linewidth=0.9, alpha=0.35)
        return _draw_trend(axis, trend(run, key), colour)
    logged = np.isfinite(y)
    error = run.metrics.get(f"stderr_{key.removeprefix('accuracy_')}")
    whiskers = np.maximum(np.nan_to_num(np.asarray(error, dtype=float)[logged]), 0.0) if error else None
    axis.errorbar(
        x[logged], y[logged], yerr=whiskers, color=colour, linewidth=1.6, elinewidth=1, fmt="-o", markersize=4
    )
    if run.best and run.best[0] == key:
        at = x == run.best[1]
        axis.plot(x[at], y[at], "*", color=colour, markeredgecolor=INK, markeredgewidth=0.7, markersize=12, zorder=3)
    return float(x[logged][-1]), float(y[logged][-1])


def _draw_seeds_run(axis: Axes, runs: Sequence[RunRecord], key: str, colour: str) -> tuple[float, float]:
    """Draw one arm of several seeds: each faint and without a name, their mean with its standard error over it."""
    for run in runs:
        dense = _dense(run, key)
        line = _thin(trend(run, key) if dense else _as_logged(run, key))
        axis.plot(line.x, line.mean, color=colour, linewidth=0.7, alpha=0.3, marker="" if dense else ".")
    mean = trend_of_seeds(runs, key)
    if not len(mean.x):  # no step that all of them logged: their own lines are all there is
        return float(line.x[-1]), float(line.mean[-1])
    return _draw_trend(axis, mean, colour)


def _draw_trend(axis: Axes, line: Trend, colour: str) -> tuple[float, float]:
    line = _thin(line)
    band = np.nan_to_num(line.stderr)
    axis.fill_between(line.x, line.mean - band, line.mean + band, color=colour, alpha=0.18, linewidth=0)
    axis.plot(line.x, line.mean, color=colour, linewidth=2, solid_capstyle="round")
    return float(line.x[-1]), float(line.mean[-1])


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the ends of the lines, pushed apart vertically where they would overlap."""
    if not ends:
        return
    low, high = axis.get_xlim()
    axis.set_xlim(low, high)
    to_axes = (axis.transData + axis.transAxes.inverted()).transform
    placed = sorted((*to_axes((x, y)), name, colour) for x, y, name, colour in ends)
    heights = _spread([point[1] for point in placed], gap=0.105)
    for (_, _, name, colour), height in zip(placed, heights, strict=True):
        axis.text(1.0, height, name, transform=axis.transAxes, color=colour, fontsize=9, fontweight="bold", va="center")


def _spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights, moved so that neighbours are at least `gap` apart and all stay inside the panel where they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = 0.03
    for i in order:
        placed[i] = floor = max(placed[i], floor)
        floor += gap
    ceiling = 0.97
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def _draw_bars(axis: Axes, values: Sequence[float], errors: Sequence[float], paint: Sequence[str]) -> None:
    for y, (value, error, colour) in enumerate(zip(values, errors, paint, strict=True)):
        if not math.isfinite(value):
            axis.text(0, y, " not measured", color=SOFT, va="center", fontsize=8.5)
            continue
        percent, whisker = 100 * value, 100 * _zero(error)
        axis.barh(y, percent, height=0.62, color=colour)
        if whisker:
            axis.errorbar(percent, y, xerr=whisker, color=INK, linewidth=1.2, capsize=3)
        axis.annotate(
            f"{percent:.1f}", (percent + whisker, y), (5, 0), textcoords="offset points", va="center", color=INK
        )
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.spines["bottom"].set_visible(False)
    axis.xaxis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_seeds(axis: Axes, y: float, cell: Any, colour: str) -> None:
    values = 100 * np.asarray(cell.values)
    offsets = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.zeros(1)
    axis.plot(values, y + offsets, "o", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0)
    axis.errorbar(100 * cell.mean, y, xerr=100 * _zero(cell.stderr), color=INK, linewidth=1.2, capsize=3)
    axis.plot(100 * cell.mean, y, "D", color=colour, markersize=6.5)


def _bytes(figure: Figure, fmt: Format) -> bytes:
    if fmt not in ("svg", "png"):
        raise ValueError(f"fmt: {fmt!r} is not a format of ours; use 'svg' or 'png'")
    out = io.BytesIO()
    if fmt == "svg":
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    else:
        figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()
