"""A profiled run's phases: medians over its steps for each rank, as a table, CSV and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import matplotlib
from matplotlib.axes import Axes
from rich.table import Table

from .plots import _RC, Format, _bytes, _figure
from .style import GRID, INK, SOFT, TRAIN_PARTS

Row = Mapping[str, float]
ORDER = ("rollout", "rollout_wait", "grade", "gather", "teacher", *TRAIN_PARTS, "sync")
OTHER, STEP = "other", "step"
_PAINT = ("#33506e", "#c9d3dd", "#8fb3a5", "#8a5a2b", "#d0a54a", "#9db8d9", "#4f78ad", "#8660b8", "#a7647a", "#b9b3a6")
COLOURS = dict(zip((*ORDER, OTHER), _PAINT, strict=True))
# Which of a row's numbers counts the tokens that a phase works on, over all ranks.
TOKENS = {"rollout": "response_tokens", "grade": "response_tokens", "teacher": "kl_tokens", STEP: "response_tokens"}
TOKENS |= dict.fromkeys(("student_forward", "student_backward"), "gradient_tokens")
# Of the work of a training step (`train_tflop`), the part that is done in a phase.
WORK = {"student_forward": 1 / 3, "student_backward": 2 / 3, STEP: 1.0}


@dataclass(frozen=True)
class PhaseRow:
    """Medians of one phase on one rank; None where a number has no meaning. tokens_per_second: of all ranks together;
    mfu: useful FLOP/s of the phase over the peak of all ranks."""

    rank: int
    phase: str
    seconds: float
    share: float
    tokens_per_second: float | None
    mfu: float | None
    memory_gib: float | None


def phase_rows(ranks: Sequence[Sequence[Row]], peak_flops: float | None) -> list[PhaseRow]:
    """`ranks[r]`: rank r's rows of metrics, one a step. `peak_flops`: of all ranks together."""
    return [row for rank, steps in enumerate(ranks) for row in _rank_rows(rank, steps, peak_flops)]


def split(row: Row) -> dict[str, float]:
    """Seconds of each phase of one step in the step's order; they add up to the step."""
    found = {key.removeprefix("seconds_"): value for key, value in row.items() if key.startswith("seconds_")}
    found.pop("train", None)  # its parts are here
    known = [name for name in ORDER if name in found]
    parts = {name: found[name] for name in [*known, *(name for name in found if name not in known)]}
    return parts | {OTHER: max(row["seconds"] - sum(parts.values()), 0.0)}


def _rank_rows(rank: int, steps: Sequence[Row], peak_flops: float | None) -> list[PhaseRow]:
    seconds = [split(step) | {STEP: step["seconds"]} for step in steps]
    whole = statistics.median(step[STEP] for step in seconds)
    rows = []
    for name in seconds[0]:
        spent = statistics.median(step.get(name, 0.0) for step in seconds)
        tokens = _median(steps, TOKENS.get(name, ""))
        work = _median(steps, "train_tflop") if name in WORK else None
        memory = _median(steps, "peak_memory_gib" if name == STEP else f"memory_gib_{name}")
        rate = tokens / spent if tokens and spent else None
        mfu = WORK[name] * work * 1e12 / (spent * peak_flops) if work and spent and peak_flops else None
        rows.append(PhaseRow(rank, name, spent, spent / whole, rate, mfu, memory))
    return rows


def _median(steps: Sequence[Row], key: str) -> float | None:
    values = [step[key] for step in steps if key in step]
    return statistics.median(values) if values else None


HEADER = ("rank", "phase", "seconds", "share", "tokens/s", "MFU", "memory GiB")


def _cells(row: PhaseRow) -> tuple[str, ...]:
    def show(value: float | None, style: str) -> str:
        return "" if value is None else format(value, style)

    numbers = (show(row.tokens_per_second, ",.0f"), show(row.mfu, ".1%"), show(row.memory_gib, ".2f"))
    return str(row.rank), row.phase, f"{row.seconds:.4g}", f"{row.share:.1%}", *numbers


def markdown(rows: Sequence[PhaseRow], notes: Sequence[str]) -> str:
    lines = [*notes, "", "| " + " | ".join(HEADER) + " |", "|--:|---|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows), ""])


def rich_table(rows: Sequence[PhaseRow]) -> Table:
    table = Table(*HEADER, box=None, header_style="bold")
    for column in (0, 2, 3, 4, 5, 6):
        table.columns[column].justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before.rank != row.rank:
            table.add_section()
        table.add_row(*_cells(row), style="bold" if row.phase == STEP else None)
    return table


def as_csv(rows: Sequence[PhaseRow]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in fields(PhaseRow)])
    writer.writerows(["" if value is None else value for value in astuple(row)] for row in rows)
    return out.getvalue()


def figure(ranks: Sequence[Sequence[Row]], *, fmt: Format = "svg") -> bytes:
    """Left: rank 0's steps, phases stacked. Right: every rank's mean step (means of parts add up, medians do not)."""
    names = [name for name in COLOURS if any(split(row).get(name, 0.0) > 0 for rows in ranks for row in rows)]
    steps = [split(row) for row in ranks[0]]
    means = [{name: statistics.fmean(split(row).get(name, 0.0) for row in rows) for name in names} for rows in ranks]
    with matplotlib.rc_context(_RC):
        drawing = _figure(9.6, 1.9 + 0.34 * max(len(steps), len(ranks), 3))
        left, right = drawing.subplots(1, 2, width_ratios=(3, 2))
        _bars(left, steps, [str(int(row["step"])) for row in ranks[0]], names)
        _bars(right, means, [f"rank {rank}" for rank in range(len(ranks))], names)
        left.set_title("Rank 0, step by step", loc="left", fontsize=10.5, fontweight="bold")
        right.set_title("Mean step of each rank", loc="left", fontsize=10.5, fontweight="bold")
        left.set_ylabel("step")
        handles, labels = left.get_legend_handles_labels()
        look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.0, "columnspacing": 1.2}
        drawing.legend(handles, labels, loc="outside lower center", ncols=len(names), **look)
        return _bytes(drawing, fmt)


def _bars(axis: Axes, stacks: Sequence[Mapping[str, float]], labels: Sequence[str], names: Sequence[str]) -> None:
    places = range(len(stacks))
    start = [0.0] * len(stacks)
    for name in names:
        widths = [stack.get(name, 0.0) for stack in stacks]
        look = {"color": COLOURS[name], "edgecolor": "white", "linewidth": 0.6}
        axis.barh(places, widths, left=start, height=0.66, label=name.replace("_", " "), **look)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for place, end in zip(places, start, strict=True):
        look = {"va": "center", "color": INK, "fontsize": 8.5}
        axis.annotate(f"{end:.3g} s", (end, place), (4, 0), textcoords="offset points", **look)
    axis.set_yticks(places, labels)
    axis.set_ylim(len(stacks) - 0.4, -0.6)
    axis.set_xlim(0, 1.16 * max(start))
    axis.set_xlabel("seconds", loc="left", fontsize=8.5, color=SOFT)
    axis.xaxis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
