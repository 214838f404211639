"""Methods side by side: what they reach, and what a step of each costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .plots import _RC, Format, _bytes, _draw_seeds, _figure
from .style import GRID, INK, PALETTE, SOFT, label
from .tables import SeedCell

KINDS = {"start": PALETTE[1], "no teacher": PALETTE[2], "teacher": PALETTE[3], "its own average": PALETTE[4]}


def methods_figure(rows: Sequence[Mapping[str, Any]], *, fmt: Format = "svg") -> bytes:
    """A line per arm, in the order of the rows: accuracy on text and on images (a dot a seed, their mean, whiskers ±
    one standard error), and the CPU seconds of a step, the teacher's share dark. A row is one seed of an arm: {"arm",
    "kind" (of KINDS), "text", "image"} and, where it was trained, "cpu_seconds" and "teacher_share"."""
    if not rows:
        raise ValueError("methods_figure: no row; give rows of arm, kind, text, image")
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    kinds = {arm: own[0]["kind"] for arm, own in arms.items()}
    with matplotlib.rc_context(_RC):
        figure = _figure(9.4, 0.32 * len(arms) + 1.3)
        *accuracies, costs = figure.subplots(1, 3, sharey=True)
        for axis, name in zip(accuracies, ("text", "image"), strict=True):
            axis.set_title(f"{name}, % correct", loc="left", fontsize=9.5, fontweight="bold")
            for y, (arm, own) in enumerate(arms.items()):
                _draw_seeds(axis, y, SeedCell(tuple(row[name] for row in own)), KINDS[kinds[arm]])
            axis.margins(x=0.08)
        _draw_costs(costs, arms)
        for axis in (*accuracies, costs):
            axis.xaxis.grid(True, color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
        accuracies[0].set_yticks(range(len(arms)), [label(arm) for arm in arms], color=INK)
        accuracies[0].set_ylim(len(arms) - 0.5, -0.5)
        shown = [kind for kind in KINDS if kind in kinds.values()]
        marks = [accuracies[0].plot([], [], "D", color=KINDS[kind], markersize=6)[0] for kind in shown]
        figure.legend(marks, shown, loc="outside lower left", ncols=len(shown), frameon=False, labelcolor=SOFT)
        return _bytes(figure, fmt)


def _draw_costs(axis: Axes, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    axis.set_title("CPU s a step, dark: teacher", loc="left", fontsize=9.5, fontweight="bold")
    for y, own in enumerate(arms.values()):
        if "cpu_seconds" not in own[0]:
            axis.text(0, y, " not measured" if own[0]["kind"] != "start" else "", color=SOFT, va="center", fontsize=8.5)
            continue
        whole, share = (statistics.fmean(row[key] for row in own) for key in ("cpu_seconds", "teacher_share"))
        axis.barh(y, whole, height=0.5, color=PALETTE[0])
        axis.barh(y, whole * share, height=0.5, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.spines["bottom"].set_visible(False)
