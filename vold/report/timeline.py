"""Start and end of a step's phases: one timeline for the page (one step) and for `vold profile` (several runs)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from vold.io import visible

from .drawing import Format, add_legend, figure_bytes, new_figure, report_style
from .read import OLD_METRICS, RunRecord, as_number, group_by
from .style import PHASES, TRAIN_PARTS, format_duration, phase_colours, short_label
from .tables import csv_text

STEP_THREAD = "train"  # the thread that trains, as vold.run.timers names it
NARROW = 0.004  # share of the axis: intervals of one phase that are nearer to each other are drawn as one
CHARACTERS = 125  # that fit into the width of the step's figure
SAMPLING = ("rollout", "grade")
TEACHER_THREAD = "teacher"  # in which a teacher outside the trainer has something to score
NOT_WORK = ("rollout_wait", "teacher_wait", "gather", *TRAIN_PARTS)  # waiting, and parts of what is drawn as a whole


class Interval(NamedTuple):
    """One interval of a phase and the thread it ran in; seconds."""

    name: str
    thread: str
    start: float
    end: float


Row = tuple[str, Sequence[Interval]]  # label, intervals that do not overlap


def read_intervals(line: Mapping[str, Any]) -> list[Interval]:
    """Return the well-formed intervals of one line of timeline.jsonl."""
    items = line.get("intervals")
    items = [item for item in items if isinstance(item, list) and len(item) == 4] if isinstance(items, list) else []
    intervals = [Interval(_phase(item[0]), str(item[1]), as_number(item[2]), as_number(item[3])) for item in items]
    return [i for i in intervals if math.isfinite(i.start) and math.isfinite(i.end) and i.end >= i.start]


def _phase(name: Any) -> str:
    return OLD_METRICS.get(f"seconds_{name}", f"seconds_{name}").removeprefix("seconds_")


def _from_zero(intervals: Sequence[Interval]) -> list[Interval]:
    """Shift intervals so that the first of them starts at second 0."""
    first = min(i.start for i in intervals)
    return [i._replace(start=i.start - first, end=i.end - first) for i in intervals]


# -- one step of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTimeline:
    """One step from second 0: rows of the training thread by depth of nesting, then those of each other thread."""

    step: str
    seconds: float
    rows: list[Row]


def step_timeline(run: RunRecord) -> StepTimeline | None:
    """The newest step on file without an evaluation, or with one where all have one; None without a step."""
    steps = [(line, intervals) for line in run.timeline if (intervals := read_intervals(line))]
    ordinary = [step for step in steps if not any(i.name == "evaluate" for i in step[1])]
    if not steps:
        return None
    line, intervals = (ordinary or steps)[-1]
    intervals = _from_zero(intervals)
    seconds = max(*(i.end for i in intervals), 1e-9)
    threads = {STEP_THREAD: []} | group_by(intervals, lambda i: i.thread)
    rows = [
        ("" if thread == STEP_THREAD else thread, _join_by_phase(row, NARROW * seconds))
        for thread, members in threads.items()
        for row in _by_depth(members)
    ]
    return StepTimeline(str(line.get("step", "?")), seconds, rows)


def _by_depth(intervals: Iterable[Interval]) -> list[list[Interval]]:
    """Rows in which an interval inside another one is a row further down."""
    rows: list[list[Interval]] = []
    for interval in sorted(intervals, key=lambda i: (i.start, -i.end)):
        row = next((row for row in rows if row[-1].end <= interval.start + 1e-9), None)
        if row is None:
            rows.append(row := [])
        row.append(interval)
    return rows


def _join_by_phase(row: Iterable[Interval], gap: float) -> list[Interval]:
    """Join thousands of short intervals of one phase, such as a grade after each group, that look like one."""
    phases = group_by(row, lambda i: i.name).values()
    return sorted((interval for phase in phases for interval in _join(phase, gap)), key=lambda i: i.start)


def _join(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    """Join intervals that overlap or are less than `gap` seconds apart; the first of them names the result."""
    joined: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: i.start):
        if joined and interval.start - joined[-1].end < gap:
            joined[-1] = joined[-1]._replace(end=max(joined[-1].end, interval.end))
        else:
            joined.append(interval)
    return joined


@report_style
def step_figure(timeline: StepTimeline, *, fmt: Format = "svg") -> bytes:
    """One row per depth and thread; wide bars carry their names, all of them a tooltip (see page.inline_svg)."""
    figure = new_figure(9.6, 0.45 + 0.24 * len(timeline.rows))
    axis = figure.subplots()
    _draw_rows(axis, timeline.rows, seconds=timeline.seconds, labelled=True)
    labels = [f"{short_label(visible(thread))} thread" if thread else "" for thread, _ in timeline.rows]
    axis.set_yticks(range(len(labels)), labels)
    axis.xaxis.set_major_formatter("{x:g} s")
    axis.tick_params(labelsize=8)
    return figure_bytes(figure, fmt)


def _draw_rows(axis: Axes, rows: Sequence[Row], *, seconds: float, labelled: bool = False) -> None:
    colours = phase_colours(list(dict.fromkeys(i.name for _, intervals in rows for i in intervals)))
    for y, (_, intervals) in enumerate(rows):
        for interval in intervals:
            length, colour = interval.end - interval.start, colours[interval.name]
            name = visible(interval.name).replace("_", " ")
            bar = axis.broken_barh([(interval.start, length)], (y - 0.4, 0.8), facecolor=colour, linewidth=0)
            if labelled:
                bar.set(gid=f"tooltip {name} {format_duration(length)}")
                bar.set(facecolor=(colour, 0.5), edgecolor=colour, linewidth=0.8)
                if CHARACTERS * length > (len(name) + 1) * seconds:
                    axis.text(interval.start + 0.005 * seconds, y, name, va="center", fontsize=8, clip_on=True)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, seconds)
    axis.xaxis.grid(True)


# -- sampler and trainer over the steps of profiled runs -----------------------------------------------------------


def by_worker(intervals: Iterable[Interval]) -> dict[str, list[Interval]]:
    """Sort intervals to the rows "sampler" and "trainer", and "teacher" where one outside the trainer scores; those
    that are no work of any are left out, such as a thread beside the training that waits for a teacher."""
    rows: dict[str, list[Interval]] = {"sampler": [], "trainer": []}
    for interval in intervals:
        if interval.thread == TEACHER_THREAD:
            rows.setdefault("teacher", []).append(interval)
        elif interval.name in SAMPLING:
            rows["sampler"].append(interval)
        elif interval.thread == STEP_THREAD and interval.name not in NOT_WORK:
            rows["trainer"].append(interval)
    return rows


def idle_shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """Share of the time from the first interval to the last in which the sampler, the trainer, and a teacher outside
    it, did not work."""
    first, last = min(i.start for i in intervals), max(i.end for i in intervals)
    busy = {worker: sum(i.end - i.start for i in _join(row, 0.0)) for worker, row in by_worker(intervals).items()}
    return {worker: 1.0 - seconds / (last - first) for worker, seconds in busy.items()}


@report_style
def workers_figure(runs: Mapping[str, Sequence[Interval]], *, fmt: Format = "svg") -> bytes:
    """A panel per named run, all from second 0 on one axis: the sampler's phases above, the trainer's below, then
    those of a teacher outside the trainer."""
    figure = new_figure(9.6, 1.1 + 1.05 * len(runs))
    axes = figure.subplots(len(runs), 1, squeeze=False, sharex=True)[:, 0]
    shifted = [_from_zero(intervals) for intervals in runs.values()]
    longest = max(i.end for intervals in shifted for i in intervals)
    drawn: set[str] = set()
    for axis, title, intervals in zip(axes, runs, shifted, strict=True):
        rows = [(worker, _join_by_phase(row, longest / 2000)) for worker, row in by_worker(intervals).items()]
        _draw_rows(axis, rows, seconds=longest)
        axis.set_yticks(range(len(rows)), [f"{name}, idle {idle:.0%}" for name, idle in idle_shares(intervals).items()])
        axis.set_title(title)
        drawn.update(i.name for _, row in rows for i in row)
    axes[-1].set_xlabel("seconds")
    add_legend(figure, {name: colour for name, colour in PHASES.items() if name in drawn})
    return figure_bytes(figure, fmt)


def to_csv(intervals: Iterable[Interval]) -> str:
    rows = ((i.name, i.thread, f"{i.start:.6f}", f"{i.end:.6f}") for i in intervals)
    return csv_text(("name", "lane", "start", "end"), rows)  # lane: the thread


def from_csv(text: str) -> list[Interval]:
    rows = csv.DictReader(text.splitlines())
    return [Interval(row["name"], row["lane"], float(row["start"]), float(row["end"])) for row in rows]
