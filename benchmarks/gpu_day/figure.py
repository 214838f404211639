"""gpu-day.png from the results on disk: rates, heads beside peers, the training step, checks."""

from __future__ import annotations

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.plot import ACCENT, QUIET, STYLE
from benchmarks.providers import FLOOR, OURS

from .journal import read_rows
from .part import Context, Item

Row = dict[str, str]


def items(context: Context) -> list[Item]:
    return [Item("gpu-day.png", draw, 3)]


def draw(context: Context) -> None:
    out, kind = context.out, context.device.type
    rates = read_rows(out / "rates.csv")
    heads = [row for row in read_rows(out / f"kernels-{kind}.csv") if row["status"] == "measured"]
    steps = read_rows(out / f"train_step-{kind}.csv")
    checks = read_rows(out / "checks.csv")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
        _rates(axes[0, 0], [row for row in rates if row["tflops"]], "tflops", "TFLOP/s")
        _rates(axes[0, 1], [row for row in rates if row["gb_per_s"]], "gb_per_s", "GB/s")
        _heads(axes[1, 0], heads)
        _steps(axes[1, 1], steps)
        facts = (rates or heads or steps or checks or [context.facts])[0]
        failed = sum(row["passed"] == "no" for row in checks)
        figure.suptitle(
            f"{facts['device']}; torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}\n"
            f"{len(checks)} checks, {failed} failed"
        )
        figure.savefig(out / "gpu-day.png", dpi=110)
        plt.close(figure)


def _rates(axes: Axes, rows: list[Row], key: str, unit: str) -> None:
    names = [" ".join(filter(None, (row["what"], row["tokens"], row["columns"], row["stored"]))) for row in rows]
    ceilings = ("square product", "copy")
    colors = [QUIET if row["what"] in ceilings else ACCENT for row in rows]
    _bars(axes, names, [float(row[key]) for row in rows], colors, unit)


def _heads(axes: Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if row["over_floor"] and row["provider"] != FLOOR]
    names = [f"{row['provider']}: {row['head']} {row['mode']} {row['tokens']}" for row in rows]
    colors = [ACCENT if row["provider"] == OURS else QUIET for row in rows]
    _bars(axes, names, [float(row["over_floor"]) for row in rows], colors, "times the matmuls alone")


def _steps(axes: Axes, rows: list[Row]) -> None:
    names = [f"{row['provider']}, {row['tokens']} tokens{', teacher' if row['teacher_hidden'] else ''}" for row in rows]
    colors = [ACCENT if row["provider"] == OURS else QUIET for row in rows]
    labels = [
        f"{float(r['median_s']):.3g} s" + (f", MFU {float(r['student_mfu']):.1%}" if r["student_mfu"] else "")
        for r in rows
    ]
    _bars(axes, names, [float(row["median_s"]) for row in rows], colors, "seconds a step", labels)


def _bars(
    axes: Axes, names: list[str], values: list[float], colors: list[str], unit: str, labels: list[str] | None = None
) -> None:
    axes.set_xlabel(unit)
    if not values:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"not measured: {unit}", ha="center", va="center")
        return
    places = range(len(names))
    axes.barh(places, values, color=colors)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    for place, value in enumerate(values):
        text = labels[place] if labels else f"{value:,.3g}"
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
