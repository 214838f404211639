"""A part's tables and figure, from its results alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from vold.io import log, write_atomically
from vold.miniature.science.protocol import START, Cell, Part, part_folder
from vold.miniature.science.results import (
    Finding,
    Result,
    accuracy,
    chosen_rates,
    counted,
    findings,
    logged,
    read_results,
    sweep_scores,
)
from vold.miniature.science.statistics import Estimate, over_seeds
from vold.report.drawing import Format, figure_bytes, new_figure, report_style
from vold.report.style import INK, PALETTE, label
from vold.report.tables import markdown

COLOURS = {START: PALETTE[0], "grpo": PALETTE[2], "vold": PALETTE[3], "vold-unmasked": PALETTE[4], "opd": PALETTE[6]}
FREE = (PALETTE[5], PALETTE[1], PALETTE[7], INK)


def write_part(root: Path, path: Path, part: Part) -> None:
    """Write all runs into one file, results.jsonl, tables.md and a figure into the part's folder."""
    folder = part_folder(root, path)
    results = read_results(folder)
    write_atomically(folder / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    text = tables(part, results)
    write_atomically(folder / "tables.md", text + "\n")
    formats: tuple[Format, ...] = ("svg", "png")
    for fmt in formats:
        (folder / f"{path.stem}.{fmt}").write_bytes(figure(part, results, fmt))
        if part.curve_every:
            (folder / f"{path.stem}-curves.{fmt}").write_bytes(curves(part, results, fmt))
    log.info(f"{text}\n\n{folder / 'tables.md'}")


def tables(part: Part, results: Sequence[Result]) -> str:
    """Accuracies, findings and sweeps of a part's runs in Markdown."""
    rates, scores, runs = chosen_rates(results, part), sweep_scores(results, part), counted(results, part)
    parts = [accuracy_table(part, runs, rates), findings_table(findings(runs, part))]
    if scores:
        parts.append(sweep_table(scores, rates))
    return "\n\n".join(parts)


def accuracy_table(part: Part, results: Sequence[Result], rates: Mapping[Cell, float]) -> str:
    """A row a cell that has been run: rate, seeds, accuracy with its 95 % interval, and the logged metrics."""
    rows = []
    for condition, one in part.conditions.items():
        for arm in (*([START] if one.start else []), *part.arms_of(one)):
            runs = [r for r in results if (r["condition"], r["arm"]) == (condition, arm)]
            if not runs:
                continue
            failed = sum("failed" in r for r in runs)
            seeds = f"{len(runs)}" + (f" ({failed} diverged)" if failed else "")
            measured = [percent(accuracy(results, condition, arm, measure)) for measure in part.sets]
            extra = [_plain(logged(results, condition, arm, key)) for key in part.logged]
            rate = "–" if arm == START else f"{rates[Cell(condition, arm)]:g}"
            rows.append([condition, label(arm), rate, seeds, *measured, *extra])
    return markdown(["condition", "arm", "rate", "seeds", *(f"{m}, %" for m in part.sets), *part.logged], rows)


def findings_table(found: Sequence[Finding]) -> str:
    """A row a comparison: points with their 95 % interval, Holm's p, the verdict."""
    rows = []
    for finding in found:
        c = finding.contrast
        where = c.condition if c.against == c.condition else f"{c.condition} against {c.against}"
        names = f"{label(c.new)} − {label(c.old)}"
        rows.append([names, c.measure, where, points(finding.estimate), _p(finding.p), finding.verdict])
    return markdown(["comparison", "on", "condition", "points [95 %]", "p, Holm", "verdict"], rows)


def sweep_table(scores: Mapping[Cell, dict[float, float]], rates: Mapping[Cell, float]) -> str:
    """Validation accuracy by learning rate; a best rate at an edge of what was tried has a *."""
    rows = []
    for cell, tried in scores.items():
        at_edge = rates[cell] in (min(tried), max(tried))
        shown = ", ".join(
            f"{rate:g}: {100 * score:.1f}" if score == score else f"{rate:g}: failed" for rate, score in tried.items()
        )
        rows.append([cell.condition, label(cell.arm), f"{rates[cell]:g}" + ("*" if at_edge else ""), shown])
    return markdown(["swept under", "arm", "rate", "validation, %, by rate"], rows)


def points(estimate: Estimate) -> str:
    """A difference with its interval: "+4.2 [1.1, 7.3]"."""
    low, high = (estimate.mean + sign * estimate.half_width for sign in (-1, 1))
    return f"{estimate.mean:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")


def percent(estimate: Estimate | None) -> str:
    """An accuracy with half of its interval: "47.2 ± 2.1"."""
    return f"{estimate.mean:.1f} ± {estimate.half_width:.1f}" if estimate else "–"


def _plain(estimate: Estimate | None) -> str:
    return f"{estimate.mean:.3g}" if estimate else "–"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< .001"


@report_style
def curves(part: Part, results: Sequence[Result], fmt: Format = "svg") -> bytes:
    """Validation accuracy on the first measure over the steps of the runs that count, a panel a condition: means over
    seeds with 95 % intervals."""
    results = counted(results, part)
    measure = next(iter(part.sets))
    conditions = [name for name in part.conditions if part.steps_of(name) > part.curve_every]  # others: one point
    canvas = new_figure(4.6 * len(conditions), 3.2)
    panels = canvas.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
    for axis, condition in zip(panels, conditions, strict=True):
        axis.set_title(f"{condition}: {measure}, validation, %", fontsize=9.5)
        axis.yaxis.grid(True)
        axis.set_xlabel("iteration" if part.command == "selfplay" else "step")
        for arm, colour in colours_of(part).items():
            of_cell = [r for r in results if (r["condition"], r["arm"]) == (condition, arm)]
            runs = [r["validation"][measure] for r in of_cell if "failed" not in r]
            if arm == START or not all(runs) or not runs:
                continue
            steps = [step for step, _ in runs[0]]
            points = [over_seeds([100 * run[place][1] for run in runs]) for place in range(len(steps))]
            means, halves = [p.mean for p in points], [p.half_width if len(runs) > 1 else 0.0 for p in points]
            axis.plot(steps, means, color=colour, label=label(arm), marker="o", markersize=3.5)
            lows, highs = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
    named = {name: line for axis in panels for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    canvas.legend(named.values(), named.keys(), loc="outside lower left", ncols=6)
    return figure_bytes(canvas, fmt)


def colours_of(part: Part) -> dict[str, str]:
    """Arm -> its colour in all figures of a part, in their order."""
    arms = [START, *part.arms] if any(c.start for c in part.conditions.values()) else [*part.arms]
    free = iter(FREE * len(arms))
    return {arm: COLOURS.get(arm) or next(free) for arm in arms}


@report_style
def figure(part: Part, results: Sequence[Result], fmt: Format = "svg") -> bytes:
    """Accuracy with 95 % intervals under the conditions that have been run: lines over their x where all have one, else
    groups."""
    results = counted(results, part)
    run = {result["condition"] for result in results}
    part = part.model_copy(update={"conditions": {n: c for n, c in part.conditions.items() if n in run}})
    canvas = new_figure(4.6 * len(part.sets), 3.2)
    arms = colours_of(part)
    for axis, measure in zip(canvas.subplots(1, len(part.sets), squeeze=False)[0], part.sets, strict=True):
        axis.set_title(f"{measure}, % correct", fontsize=9.5)
        axis.yaxis.grid(True)
        for number, (arm, colour) in enumerate(arms.items()):
            offset = number / len(arms) - 0.5
            _draw_arm(axis, part, [accuracy(results, c, arm, measure) for c in part.conditions], offset, colour, arm)
        _name_conditions(axis, part)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower left", ncols=min(6, len(arms)))
    return figure_bytes(canvas, fmt)


def _draw_arm(
    axis: Axes, part: Part, estimates: Sequence[Estimate | None], offset: float, colour: str, arm: str
) -> None:
    places = _places(part)
    drawn = [(x, e) for x, e in zip(places, estimates, strict=True) if e is not None]
    if not drawn:
        return
    on_axis = _has_axis(part)
    xs = [x if on_axis else x + 0.7 * offset for x, _ in drawn]
    means, errors = [e.mean for _, e in drawn], [e.half_width for _, e in drawn]
    line = {"marker": "o", "linestyle": "-" if on_axis else "none", "markersize": 5, "capsize": 2.5, "linewidth": 1.6}
    axis.errorbar(xs, means, yerr=errors, color=colour, label=label(arm), **line)


def _has_axis(part: Part) -> bool:
    return all(condition.x is not None for condition in part.conditions.values())


def _places(part: Part) -> list[float]:
    if _has_axis(part):
        return [float(condition.x or 0.0) for condition in part.conditions.values()]
    return [float(number) for number in range(len(part.conditions))]


def _name_conditions(axis: Axes, part: Part) -> None:
    if not _has_axis(part):
        axis.set_xticks(range(len(part.conditions)), _lines([*part.conditions]))
        axis.set_xlim(-0.5, len(part.conditions) - 0.5)
        return
    places = _places(part)
    positive = [x for x in places if x > 0]
    if positive and max(positive) / min(positive) >= 100:
        axis.set_xscale("log") if min(places) > 0 else axis.set_xscale("symlog", linthresh=min(positive))
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.set_xlabel(part.x_label)
    for name, x in part.x_marks.items():
        axis.axvline(x, color=INK, linestyle=":", linewidth=1, zorder=0)
        at = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points"}
        axis.annotate(name, (x, 0.3), fontsize=8.5, **at)


def _lines(names: Sequence[str]) -> list[str]:
    """Names broken where they would meet under an axis."""
    return [textwrap.fill(name, 60 // len(names)) for name in names]
