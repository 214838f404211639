"""Self-play over its iterations: accuracy, how much the questions repeat, and a map of them.

Shape letters: Q questions of an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .plots import _RC, Format, _bytes, _figure, _label_ends
from .style import GRID, PALETTE, SOFT

PANELS = {
    "accuracy_text": ("Held-out accuracy", "share of problems that the solver solves"),
    "labels_right": ("Labels that are right", "share of kept questions, where the truth is known"),
    "clusters_words": ("Clusters by words", "per question; low: they read alike"),
    "clusters_vectors": ("Clusters by code", "per question; low while words differ: surface illusion"),
    "nearest_earlier": ("Nearest earlier question", "mean cosine with iterations before"),
    "recycled": ("Recycled", "share near an earlier one; high: local illusion"),
}


@dataclass(frozen=True)
class SelfplayRecord:
    """One run. rows: metrics of each iteration, its number under `step`; maps: each iteration's questions as points
    [Q, 2] of a plane that all records share, or nothing."""

    rows: Sequence[Mapping[str, float]]
    maps: Sequence[np.ndarray] = ()


def diversity_figure(arms: Mapping[str, Sequence[SelfplayRecord]], *, fmt: Format = "svg") -> bytes:
    """A panel per number that any run logged (runs of an arm faint, their mean strong), then a map per arm, of its
    first run, later iterations darker."""
    keys = [key for key in PANELS if any(key in row for runs in arms.values() for run in runs for row in run.rows)]
    mapped = {name: runs[0].maps for name, runs in arms.items() if runs and runs[0].maps}
    if not keys:
        raise ValueError(f"diversity_figure: no run of {list(arms)} logged any of {', '.join(PANELS)}")
    across = 3
    rows_of_numbers = math.ceil(len(keys) / across)
    down = rows_of_numbers + math.ceil(len(mapped) / across)
    with matplotlib.rc_context(_RC):
        figure = _figure(3.7 * across, 2.7 * down)
        figure.get_layout_engine().set(hspace=0.1, wspace=0.06)
        axes = figure.subplots(down, across, squeeze=False)
        for axis in axes.ravel():
            axis.set_axis_off()
        for axis, key in zip(axes[:rows_of_numbers].ravel(), keys, strict=False):
            _draw_numbers(axis, arms, key)
        limits = _limits(list(mapped.values()))
        for axis, (name, maps) in zip(axes[rows_of_numbers:].ravel(), mapped.items(), strict=False):
            _draw_map(axis, name, maps, limits)
        return _bytes(figure, fmt)


def _draw_numbers(axis: Axes, arms: Mapping[str, Sequence[SelfplayRecord]], key: str) -> None:
    title, unit = PANELS[key]
    axis.set_axis_on()
    ends = []
    for colour, (name, runs) in zip(PALETTE[2:], arms.items(), strict=False):
        series = [{row["step"]: row[key] for row in run.rows if key in row} for run in runs]
        if not any(series):
            continue
        if len(series) > 1:
            for found in series:
                axis.plot(list(found), list(found.values()), color=colour, linewidth=0.9, alpha=0.35)
        steps = sorted(set.intersection(*map(set, series)))
        mean = [float(np.mean([found[step] for found in series])) for step in steps]
        axis.plot(steps, mean, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        ends.append((float(steps[-1]), mean[-1], name, colour))
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=16)
    axis.text(0, 1.035, unit, transform=axis.transAxes, color=SOFT, fontsize=8.5, va="bottom")
    axis.set_xlabel("iteration", loc="left", fontsize=8.5)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.yaxis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    _label_ends(axis, ends)


def _draw_map(axis: Axes, name: str, maps: Sequence[np.ndarray], limits: tuple[np.ndarray, np.ndarray]) -> None:
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.3, 1.0, len(maps)))
    for number, (points, shade) in enumerate(zip(maps, shades, strict=True), start=1):
        axis.scatter(points[:, 0], points[:, 1], s=7, color=shade, linewidths=0, alpha=0.8, label=str(number))
    title = f"Map of questions, {name}" if name else "Map of questions"
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=16)
    unit = "two principal components; one dot a question"
    axis.text(0, 1.035, unit, transform=axis.transAxes, color=SOFT, fontsize=8.5, va="bottom")
    axis.set_xlim(limits[0][0], limits[1][0])
    axis.set_ylim(limits[0][1], limits[1][1])
    axis.legend(
        title="iteration",
        loc="center left",
        bbox_to_anchor=(0.98, 0.5),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        handletextpad=0.1,
        markerscale=1.6,
    )


def _limits(maps: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The same window for every map."""
    points = [points for found in maps for points in found if len(points)]
    if not points:
        return np.zeros(2), np.ones(2)
    every = np.concatenate(points)
    low, high = every.min(0), every.max(0)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
