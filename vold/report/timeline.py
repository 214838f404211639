"""One step as a timeline: what ran when, what ran inside it, and what ran beside the training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .health import phase_colours
from .read import RunRecord, as_number

STEP_LANE = "train"  # vold.run.timers.PhaseTimers.MAIN_THREAD: the thread that trains
NARROW = 0.004  # of the timeline: passages of one phase that are nearer to each other are drawn as one


@dataclass(frozen=True)
class Passage:
    """A phase from `start` to `end`, seconds from the timeline's beginning; `left` and `width` in percent of it."""

    name: str
    start: float
    end: float
    left: float = 0.0
    width: float = 0.0
    colour: str = ""


@dataclass(frozen=True)
class Timeline:
    """Rows of passages that do not overlap: the step's own by depth of nesting, then a row or more for each thread
    beside it, named by its lane."""

    step: str
    seconds: float
    rows: list[tuple[str, list[Passage]]]
    ticks: list[tuple[float, float]]  # place in percent, seconds


def timeline(run: RunRecord) -> Timeline | None:
    """The newest ordinary step on file: one without an evaluation, if there is one."""
    steps = [(row, found) for row in run.timeline if (found := list(_intervals(row)))]
    ordinary = [item for item in steps if not any(name == "evaluate" for name, *_ in item[1])]
    if not steps:
        return None
    row, found = (ordinary or steps)[-1]
    return _draw(str(row.get("step", "?")), found)


def _intervals(row: Mapping[str, Any]) -> Iterable[tuple[str, str, float, float]]:
    """Those of a row that are well formed."""
    found = row.get("intervals")
    for item in found if isinstance(found, list) else ():
        if isinstance(item, list) and len(item) == 4:
            start, end = as_number(item[2]), as_number(item[3])
            if math.isfinite(start) and math.isfinite(end) and end >= start:
                yield str(item[0]), str(item[1]), start, end


def _draw(step: str, found: Sequence[tuple[str, str, float, float]]) -> Timeline:
    zero, last = min(start for *_, start, _ in found), max(end for *_, end in found)
    whole = max(last - zero, 1e-9)
    paint = phase_colours(list(dict.fromkeys(name for name, *_ in found)))
    lanes: dict[str, list[Passage]] = {}
    for name, lane, start, end in found:
        lanes.setdefault(lane, []).append(Passage(name, start - zero, end - zero, colour=paint[name]))
    rows = [
        ("" if lane == STEP_LANE else lane, [_placed(passage, whole) for passage in _joined(row, NARROW * whole)])
        for lane in sorted(lanes, key=lambda lane: lane != STEP_LANE)
        for row in _by_depth(lanes[lane])
    ]
    return Timeline(step, whole, rows, [(100 * at / whole, at) for at in _ticks(whole)])


def _by_depth(passages: Sequence[Passage]) -> list[list[Passage]]:
    """What runs inside another passage goes a row further down."""
    rows: list[list[Passage]] = []
    for passage in sorted(passages, key=lambda p: (p.start, -p.end)):
        depth = next((i for i, row in enumerate(rows) if row[-1].end <= passage.start + 1e-9), len(rows))
        if depth == len(rows):
            rows.append([])
        rows[depth].append(passage)
    return rows


def _joined(row: Sequence[Passage], narrow: float) -> list[Passage]:
    """Thousands of short passages of one phase, a grade after each group, are one to the eye."""
    kept: list[Passage] = []
    for passage in row:
        if kept and kept[-1].name == passage.name and passage.start - kept[-1].end < narrow:
            kept[-1] = replace(kept[-1], end=passage.end)
        else:
            kept.append(passage)
    return kept


def _placed(passage: Passage, whole: float) -> Passage:
    return replace(passage, left=100 * passage.start / whole, width=100 * (passage.end - passage.start) / whole)


def _ticks(whole: float) -> list[float]:
    """Round numbers of seconds, four to eight of them."""
    power = 10 ** math.floor(math.log10(whole))
    unit = next(power * factor for factor in (0.1, 0.2, 0.25, 0.5, 1, 2) if whole / (power * factor) <= 8)
    return [unit * i for i in range(int(whole / unit) + 1)]
