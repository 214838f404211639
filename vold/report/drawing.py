"""The common look of all figures, and figures as bytes: self-contained SVG, or PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import Formatter

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


def tick_texts(values: Sequence[float], *, share: bool = False) -> list[str]:
    """Tick labels with equally many digits and nothing that a reader has to add: no offset, no common power of ten.
    share: in percent."""
    numbers = [100 * value if share else value for value in values]
    steps = [abs(b - a) for a, b in pairwise(numbers) if a != b]
    largest, step = max(map(abs, numbers), default=0.0), min(steps, default=0.0)
    if largest and not 1e-3 <= largest < 1e6:
        wanted = [f"{number:.{digits}e}" for digits in range(3) for number in numbers]
        shortest = [wanted[i : i + len(numbers)] for i in range(0, len(wanted), len(numbers))]
        texts = next((texts for texts in shortest if len(set(texts)) == len(numbers)), shortest[-1])
        texts = [re.sub(r"e([+-])0*(\d)", r"e\1\2", text).replace("e+", "e") for text in texts]
    else:
        close = 1e-3 * (step or largest)
        digits = next((d for d in range(8) if all(abs(round(n, d) - n) <= close for n in numbers)), 8)
        texts = [f"{number:,.{digits}f}" for number in numbers]
    plain = ["0" if not number else re.sub(r"^-", "−", text) for text, number in zip(texts, numbers, strict=True)]
    return [f"{text} %" for text in plain] if share else plain


class PlainFormatter(Formatter):
    """Writes ticks as `tick_texts` does."""

    def __init__(self, *, share: bool = False) -> None:
        self._share = share

    def __call__(self, value: float, position: int | None = None) -> str:
        return tick_texts([value], share=self._share)[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return tick_texts([round(float(value), 12) for value in values], share=self._share)


def drawn_range(low: float, high: float, *, share: bool = False) -> tuple[float, float]:
    """The y axis for values from `low` to `high`: no narrower than a tenth of the largest, so that rounding does not
    look like a curve. A share is drawn over ten points or more, and inside [0, 1]."""
    narrowest = 0.1 if share else 0.1 * max(abs(low), abs(high)) or 1.0
    missing = max(narrowest - (high - low), 0.0)
    least, most = (0.0, 1.0) if share else (0.0 if low >= 0 else -math.inf, math.inf)
    low, high = low - missing / 2, high + missing / 2
    if low < least:
        low, high = least, high + least - low
    if high > most:
        low, high = max(low - (high - most), least), most
    edge = 0.04 * (high - low)  # for the width of a line
    return low - edge, high + edge


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
