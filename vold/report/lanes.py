"""Who works when: a profiled run's sampler and trainer, side by side over its steps, and how long each waits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib

from .plots import _RC, Format, _bytes, _figure
from .profile import COLOURS
from .style import GRID, INK, SOFT, TRAIN_PARTS

SAMPLING = ("rollout", "grade")
_PAINT = {**COLOURS, "train": COLOURS["student_backward"]}
NOT_DRAWN = ("rollout_wait", "gather", *TRAIN_PARTS)  # waiting, and parts of what is drawn whole


class Span(NamedTuple):
    """One passage of a phase, in seconds. `lane`: the thread it ran in."""

    name: str
    lane: str
    start: float
    end: float


def who(span: Span) -> str | None:
    """The row that a span is work of. None for what is not drawn, and where a thread beside the trainer's waits for a
    teacher."""
    if span.name in SAMPLING:
        return "sampler"
    return "trainer" if span.lane == "train" and span.name not in NOT_DRAWN else None


def by_row(spans: Iterable[Span]) -> dict[str, list[Span]]:
    rows: dict[str, list[Span]] = {"sampler": [], "trainer": []}
    for span in spans:
        if (row := who(span)) is not None:
            rows[row].append(span)
    return rows


def idle_shares(spans: Sequence[Span]) -> dict[str, float]:
    """Of sampler and trainer, the share of the time from the first span to the last in which neither of its phases
    ran."""
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    return {row: 1.0 - _covered(found) / (last - first) for row, found in by_row(spans).items()}


def _covered(spans: Iterable[Span]) -> float:
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(span.end - max(span.start, reached), 0.0)
        reached = max(reached, span.end)
    return covered


def as_csv(spans: Iterable[Span]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Span._fields)
    writer.writerows((name, lane, f"{start:.6f}", f"{end:.6f}") for name, lane, start, end in spans)
    return out.getvalue()


def from_csv(text: str) -> list[Span]:
    rows = csv.DictReader(io.StringIO(text))
    return [Span(row["name"], row["lane"], float(row["start"]), float(row["end"])) for row in rows]


def figure(runs: Mapping[str, Sequence[Span]], *, fmt: Format = "svg") -> bytes:
    """A band for each named run, all from second 0 on one axis: above the sampler's phases, below the trainer's."""
    with matplotlib.rc_context(_RC):
        drawing = _figure(9.6, 1.1 + 1.05 * len(runs))
        axes = drawing.subplots(len(runs), 1, squeeze=False, sharex=True)[:, 0]
        seen: dict[str, object] = {}
        for axis, (title, spans) in zip(axes, runs.items(), strict=True):
            zero, rows, idle = min(span.start for span in spans), by_row(spans), idle_shares(spans)
            for place, (_, found) in enumerate(rows.items()):
                for name in dict.fromkeys(span.name for span in found):
                    bars = [(span.start - zero, span.end - span.start) for span in found if span.name == name]
                    seen[name] = axis.broken_barh(bars, (place - 0.36, 0.72), color=_PAINT.get(name, SOFT), linewidth=0)
            axis.set_yticks(range(len(rows)), [f"{row}, idle {idle[row]:.0%}" for row in rows])
            axis.set_ylim(1.5, -0.5)
            axis.xaxis.grid(True, color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes[-1].set_xlim(left=0)
        axes[-1].set_xlabel("seconds", loc="left", fontsize=8.5, color=SOFT)
        look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.0, "columnspacing": 1.2}
        names = [name for name in _PAINT if name in seen] + [name for name in seen if name not in _PAINT]
        labels = [name.replace("_", " ") for name in names]
        drawing.legend([seen[name] for name in names], labels, loc="outside lower center", ncols=len(names), **look)
        return _bytes(drawing, fmt)
