"""The common look of all figures, and figures as bytes: self-contained SVG, or PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .style import GRID, INK, SOFT

Format = Literal["svg", "png"]
report_style = matplotlib.rc_context(
    {
        "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
        "svg.hashsalt": "vold",  # the same figure gives the same bytes
        "font.size": 9.5,
        "font.family": ["DejaVu Sans"],
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": SOFT,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.labelsize": 8.5,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xaxis.labellocation": "left",
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.0,
        "legend.columnspacing": 1.2,
        "text.parse_math": False,  # names and labels are text, never TeX
    }
)
"""Decorator of every function that draws a figure."""
_SAVE_OPTIONS: dict[str, dict] = {
    "svg": {"transparent": True, "metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))},
    "png": {"dpi": 160, "facecolor": "white"},
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def figure_bytes(figure: Figure, fmt: Format) -> bytes:
    if fmt not in _SAVE_OPTIONS:
        raise ValueError(f"fmt: {fmt!r} is not supported; use 'svg' or 'png'")
    out = io.BytesIO()
    figure.savefig(out, format=fmt, **_SAVE_OPTIONS[fmt])
    return out.getvalue()


def set_panel_title(axis: Axes, title: str, unit: str) -> None:
    """Title in bold, the unit below it, both at the left."""
    axis.set_title(title, pad=16)
    axis.text(0, 1.035, unit, transform=axis.transAxes, color=SOFT, fontsize=8.5, va="bottom")


def add_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """A legend of phases below the figure."""
    patches = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(len(patches), 1))


def label_line_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names at the ends (x, y, name, colour) of lines, pushed apart vertically where they would overlap."""
    if not ends:
        return
    axis.set_xlim(*axis.get_xlim())
    to_axes = (axis.transData + axis.transAxes.inverted()).transform
    heights = spread_labels([to_axes((x, y))[1] for x, y, _, _ in ends], gap=0.105)
    look = {"transform": axis.transAxes, "fontsize": 9, "fontweight": "bold", "va": "center"}
    for (_, _, name, colour), height in zip(ends, heights, strict=True):
        axis.text(1.0, height, name, color=colour, **look)


def spread_labels(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move heights so that neighbours are at least `gap` apart and all stay inside the panel where they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    lowest = 0.03
    for i in order:
        placed[i] = max(placed[i], lowest)
        lowest = placed[i] + gap
    highest = 0.97
    for i in reversed(order):
        placed[i] = min(placed[i], highest)
        highest = placed[i] - gap
    return placed
