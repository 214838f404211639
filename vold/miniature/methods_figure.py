"""Methods side by side: the accuracies they reach, and the cost of a step of each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vold.report.drawing import Format, figure_bytes, new_figure, report_style
from vold.report.plots import draw_seeds
from vold.report.style import INK, PALETTE, SOFT, label
from vold.report.tables import Mean

KINDS = {"start": PALETTE[1], "no teacher": PALETTE[2], "teacher": PALETTE[3], "its own average": PALETTE[4]}


@report_style
def methods_figure(rows: Sequence[Mapping[str, Any]], *, fmt: Format = "svg") -> bytes:
    """A line per arm, in the order of the rows: accuracy on text and on images (a dot a seed, their mean, error bars ±
    one standard error), and the CPU seconds of a step, the teacher's share dark.

    A row is one seed of an arm: {"arm", "kind" (of KINDS), "text", "image"} and, where it was trained, "cpu_seconds"
    and "teacher_share". Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("methods_figure: no row; give rows of arm, kind, text, image")
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    figure = new_figure(9.4, 0.32 * len(arms) + 1.3)
    *accuracies, costs = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(accuracies, ("text", "image"), strict=True):
        axis.set_title(f"{name}, % correct", fontsize=9.5)
        for y, seeds in enumerate(arms.values()):
            draw_seeds(axis, y, Mean(tuple(row[name] for row in seeds)), KINDS[seeds[0]["kind"]])
        axis.margins(x=0.08)
    _draw_costs(costs, arms)
    for axis in (*accuracies, costs):
        axis.xaxis.grid(True)
    accuracies[0].set_yticks(range(len(arms)), [label(arm) for arm in arms], color=INK)
    accuracies[0].set_ylim(len(arms) - 0.5, -0.5)
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    marks = [accuracies[0].plot([], [], "D", color=KINDS[kind], markersize=6)[0] for kind in kinds]
    look = {"fontsize": 9.5, "handlelength": 2.0, "columnspacing": 2.0}
    figure.legend(marks, kinds, loc="outside lower left", ncols=len(kinds), labelcolor=SOFT, **look)
    return figure_bytes(figure, fmt)


def _draw_costs(axis: Axes, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    axis.set_title("CPU s a step, dark: teacher", fontsize=9.5)
    for y, seeds in enumerate(arms.values()):
        if "cpu_seconds" not in seeds[0]:
            note = " not measured" if seeds[0]["kind"] != "start" else ""
            axis.text(0, y, note, color=SOFT, va="center", fontsize=8.5)
            continue
        seconds, share = (statistics.fmean(row[key] for row in seeds) for key in ("cpu_seconds", "teacher_share"))
        axis.barh(y, seconds, height=0.5, color=PALETTE[0])
        axis.barh(y, seconds * share, height=0.5, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.spines["bottom"].set_visible(False)
