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

from vold.report.drawing import (
    Format,
    figure_bytes,
    label_line_ends,
    new_figure,
    report_style,
    set_panel_title,
)
from vold.report.style import PALETTE

PANELS = {
    "accuracy_text": ("Held-out accuracy", "share of problems that the solver solves"),
    "labels_right": ("Labels that are right", "share of kept questions, where the truth is known"),
    "clusters_words": ("Clusters by words", "per question; low: they read alike"),
    "clusters_vectors": ("Clusters by code", "per question; low while words differ: surface illusion"),
    "nearest_earlier": ("Nearest earlier question", "mean cosine with iterations before"),
    "recycled": ("Recycled", "share near an earlier one; high: local illusion"),
}
ACROSS = 3  # panels in a row


@dataclass(frozen=True)
class SelfplayRecord:
    """One run.

    rows   metrics of each iteration, its number under `step`
    maps   each iteration's questions as points [Q, 2] of a plane that all records share, or nothing
    """

    rows: Sequence[Mapping[str, float]]
    maps: Sequence[np.ndarray] = ()


@report_style
def diversity_figure(arms: Mapping[str, Sequence[SelfplayRecord]], *, fmt: Format = "svg") -> bytes:
    """A panel per metric that any run logged (runs of an arm faint, their mean strong), then a map per arm, of its
    first run, later iterations darker. Raises ValueError where no run logged any."""
    keys = [key for key in PANELS if any(key in row for runs in arms.values() for run in runs for row in run.rows)]
    maps = {name: runs[0].maps for name, runs in arms.items() if runs and runs[0].maps}
    if not keys:
        raise ValueError(f"diversity_figure: no run of {list(arms)} logged any of {', '.join(PANELS)}")
    metric_rows = math.ceil(len(keys) / ACROSS)
    down = metric_rows + math.ceil(len(maps) / ACROSS)
    figure = new_figure(3.7 * ACROSS, 2.7 * down)
    figure.get_layout_engine().set(hspace=0.1, wspace=0.06)
    axes = figure.subplots(down, ACROSS, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, key in zip(axes[:metric_rows].ravel(), keys, strict=False):
        _draw_metric(axis, arms, key)
    low, high = _limits([points for arm in maps.values() for points in arm if len(points)])
    for axis, (name, points) in zip(axes[metric_rows:].ravel(), maps.items(), strict=False):
        _draw_map(axis, name, points)
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    return figure_bytes(figure, fmt)


def _draw_metric(axis: Axes, arms: Mapping[str, Sequence[SelfplayRecord]], key: str) -> None:
    axis.set_axis_on()
    ends = []
    for colour, (name, runs) in zip(PALETTE[2:], arms.items(), strict=False):
        lines = [{row["step"]: row[key] for row in run.rows if key in row} for run in runs]
        if not any(lines):
            continue
        if len(lines) > 1:
            for line in lines:
                axis.plot(list(line), list(line.values()), color=colour, linewidth=0.9, alpha=0.35)
        steps = sorted(set.intersection(*map(set, lines)))
        mean = [float(np.mean([line[step] for line in lines])) for step in steps]
        axis.plot(steps, mean, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        ends.append((float(steps[-1]), mean[-1], name, colour))
    set_panel_title(axis, *PANELS[key])
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.yaxis.grid(True)
    label_line_ends(axis, ends)


def _draw_map(axis: Axes, name: str, maps: Sequence[np.ndarray]) -> None:
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.3, 1.0, len(maps)))
    for number, (points, shade) in enumerate(zip(maps, shades, strict=True), start=1):
        axis.scatter(points[:, 0], points[:, 1], s=7, color=shade, linewidths=0, alpha=0.8, label=str(number))
    title = f"Map of questions, {name}" if name else "Map of questions"
    set_panel_title(axis, title, "two principal components; one dot a question")
    look = {"fontsize": 8, "title_fontsize": 8, "handletextpad": 0.1, "markerscale": 1.6}
    axis.legend(title="iteration", loc="center left", bbox_to_anchor=(0.98, 0.5), **look)


def _limits(points: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same window for every map."""
    if not points:
        return np.zeros(2), np.ones(2)
    every = np.concatenate(points)
    low, high = every.min(0), every.max(0)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
