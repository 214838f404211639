"""Plots time and memory of every provider from the CSV files: PNG and SVG beside them.

    python -m benchmarks.plot [--out benchmarks/results]

One figure per file, mode and head: bars where there is one N, lines over N where there are several. Whiskers are p20
and p80. The dashed line is the floor: the matmuls alone, measured in the same run.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .harness import read_rows
from .problem import LOGPROB
from .providers import FLOOR, OURS, PROVIDERS
from .summary import MODES, Row

INK, QUIET, ACCENT = "#222222", "#9aa5b1", "#d1495b"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "vold"}
PEERS = [name for name in PROVIDERS if name not in (OURS, FLOOR)]
SHADES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#7a5195", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
COLORS = {OURS: ACCENT, FLOOR: INK} | dict(zip(PEERS, SHADES, strict=True))


def write(folder: Path) -> None:
    for path in sorted(folder.glob("kernels-*.csv")):
        rows = [row for row in read_rows(path) if row["status"] == "measured"]
        for (mode, head), group in groupby(rows, key=lambda row: (row["mode"], row["head"])):
            with plt.rc_context(STYLE):
                _figure(list(group), folder / f"{path.stem}-{mode}-{head}")


def _figure(rows: list[Row], stem: Path) -> None:
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 0.32 * 11 + 1), layout="constrained")
    if len({row["tokens"] for row in rows}) == 1:
        _bars(time_axes, memory_axes, rows)
    else:
        _lines(time_axes, memory_axes, rows)
    first = rows[0]
    shape = f"D {first['hidden']}, V {first['vocab']}, {first['dtype']}"
    figure.suptitle(
        f"{MODES[first['mode']]}: {first['head']} head, {shape}\n{first['device']}, commit {first['commit']}"
    )
    for ending in ("png", "svg"):
        metadata = {"Date": None} if ending == "svg" else None
        figure.savefig(stem.with_suffix(f".{ending}"), dpi=150, metadata=metadata)
    plt.close(figure)


def _bars(time_axes: Axes, memory_axes: Axes, rows: list[Row]) -> None:
    floor = next((float(row["median_s"]) for row in rows if row["provider"] == FLOOR), None)
    rows = sorted((row for row in rows if row["provider"] != FLOOR), key=lambda row: -float(row["median_s"]))
    names = [row["provider"] for row in rows]
    colors = [ACCENT if name == OURS else QUIET for name in names]
    medians = [float(row["median_s"]) for row in rows]
    whiskers = [
        [max(m - float(row["p20_s"]), 0) for m, row in zip(medians, rows, strict=True)],
        [max(float(row["p80_s"]) - m, 0) for m, row in zip(medians, rows, strict=True)],
    ]
    time_axes.barh(names, medians, xerr=whiskers, color=colors, ecolor=INK, capsize=3)
    for i, (median, whisker) in enumerate(zip(medians, whiskers[1], strict=True)):
        time_axes.annotate(f"{median:.3g} s", (median + whisker, i), (5, 0), textcoords="offset points", va="center")
    if floor:
        time_axes.axvline(floor, color=INK, linestyle="--", linewidth=1)
        at = (floor, len(names) - 0.45)
        time_axes.annotate(f"matmuls alone {floor:.3g} s", at, (5, 0), textcoords="offset points", va="bottom")
    memory = [float(row["peak_extra_mib"]) for row in rows]
    memory_axes.barh(names, memory, color=colors)
    for i, mib in enumerate(memory):
        memory_axes.annotate(f"{mib:,.0f} MiB", (mib, i), (5, 0), textcoords="offset points", va="center")
    memory_axes.set_yticks([])
    _label(time_axes, memory_axes, rows[0])
    for axes in (time_axes, memory_axes):
        axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
        axes.set_ylim(-0.6, len(names) - 0.1)


def _lines(time_axes: Axes, memory_axes: Axes, rows: list[Row]) -> None:
    for name in [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]:
        provider_rows = [row for row in rows if row["provider"] == name]
        tokens, medians = (
            [int(row["tokens"]) for row in provider_rows],
            [float(row["median_s"]) for row in provider_rows],
        )
        low = [max(m - float(row["p20_s"]), 0) for m, row in zip(medians, provider_rows, strict=True)]
        high = [max(float(row["p80_s"]) - m, 0) for m, row in zip(medians, provider_rows, strict=True)]
        look = {"color": COLORS[name], "linewidth": 2.5 if name == OURS else 1.2}
        look["linestyle"] = "--" if name == FLOOR else "-"
        time_axes.errorbar(tokens, medians, yerr=[low, high], marker="o", markersize=4, capsize=3, label=name, **look)
        if name != FLOOR:
            memory_axes.plot(
                tokens, [float(row["peak_extra_mib"]) for row in provider_rows], marker="o", markersize=4, **look
            )
    ticks = sorted({int(row["tokens"]) for row in rows})
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.25)
    time_axes.figure.legend(loc="outside right center", frameon=False)
    _label(time_axes, memory_axes, rows[0], vertical=True)


def _label(time_axes: Axes, memory_axes: Axes, row: Row, *, vertical: bool = False) -> None:
    include = "" if row["mode"] == LOGPROB else ", gradients included"
    for axes, text in ((time_axes, "seconds"), (memory_axes, f"peak MiB beyond the inputs{include}")):
        (axes.set_ylabel if vertical else axes.set_xlabel)(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    write(parser.parse_args().out)
