"""The cost of a teacher on GPUs of its own: `vold plan --teacher-gpus … --plot FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from .drawing import Format, figure_bytes, new_figure, report_style, set_panel_title, spread_labels
from .read import group_by
from .style import GRID, INK, PALETTE, PHASES, SOFT


@dataclass(frozen=True)
class CostPoint:
    """A step whose teacher has `gpus` GPUs (0: it is in the trainer) where `accuracy` of the responses are right.
    at_once: sampling and training go on side by side (rollout.lag). Seconds: of the teacher's own work, of sampling, of
    training, of waiting for the teacher, of the step."""

    gpus: int
    accuracy: float
    at_once: bool
    fits: bool
    scoring: float
    sampling: float
    training: float
    waiting: float
    step: float

    @property
    def share(self) -> float:
        """Of the step, waiting for the teacher."""
        return self.waiting / self.step if self.step else 0.0

    @property
    def unhidden(self) -> float:
        """The same if it scored while nothing else happened."""
        step = self.scoring + (max if self.at_once else sum)((self.sampling, self.training))
        return self.scoring / step if step else 0.0


@report_style
def cost_figure(points: Sequence[CostPoint], accuracy: float, target: float, *, fmt: Format = "svg") -> bytes:
    """Two panels over the number of GPUs: the share of a step that waits, a line for each accuracy; and the seconds of
    a step at `accuracy`, with what the teacher does meanwhile. Raises ValueError without points at `accuracy`."""
    shown = [point for point in points if point.accuracy == accuracy]
    if not shown:
        raise ValueError("cost_figure: no point at this accuracy; give more teacher GPUs: its weights do not fit")
    figure = new_figure(9.4, 3.3)
    left, right = figure.subplots(1, 2)
    _draw_shares(left, points, accuracy, target)
    _draw_steps(right, shown)
    return figure_bytes(figure, fmt)


def _draw_shares(axis: Axes, points: Sequence[CostPoint], accuracy: float, target: float) -> None:
    set_panel_title(axis, "step that waits for the teacher", "by teacher GPUs; lines: share of right responses")
    ends = []
    for value, line in group_by(points, lambda point: point.accuracy).items():
        bold = value == accuracy
        colour = PALETTE[3] if bold else PALETTE[0]
        gpus, shares = [point.gpus for point in line], [point.share for point in line]
        axis.plot(gpus, shares, "o-", color=colour, linewidth=2.2 if bold else 1.3, markersize=4.5 if bold else 3)
        ends.append((gpus[0], shares[0], f"{value:.0%}", colour))
    top = max(target * 1.3, *(1.08 * point.share for point in points))
    counts = sorted({point.gpus for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(counts[0] / 1.5, counts[-1] * 1.2)
    axis.set_ylim(0, top)
    axis.axhline(target, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axis.annotate(
        f"{target:.0%}", (1, target), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
        ha="right", color=INK, fontsize=8.5,
    )  # fmt: skip
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.yaxis.grid(True)
    heights = spread_labels([share / top for _, share, _, _ in ends], gap=0.075)
    for (x, _, name, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            name, (x, height * top), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", color=colour,
            fontsize=8.5, fontweight="bold",
        )  # fmt: skip


def _draw_steps(axis: Axes, points: Sequence[CostPoint]) -> None:
    accuracy = points[0].accuracy
    set_panel_title(
        axis, f"a step at {accuracy:.0%} right", "seconds at the GPUs' peaks; below each: the teacher's work"
    )
    for y, point in enumerate(points):
        row = {"height": 0.3 if point.at_once else 0.42, "linewidth": 0}
        top = y - (0.32 if point.at_once else 0.18)
        axis.barh(top, point.sampling, color=PHASES["rollout"], **row)
        end = max(point.sampling, point.training) if point.at_once else point.sampling
        axis.barh(top, point.waiting, left=end, color=PALETTE[3], **row)
        began = 0.0 if point.at_once else point.sampling + point.waiting
        axis.barh(y if point.at_once else top, point.training, left=began, color=PHASES["train"], **row)
        scored = max((point.step if point.at_once else point.sampling + point.waiting) - point.scoring, 0.0)
        axis.barh(y + 0.26, point.scoring, 0.2, left=scored, color=PHASES["teacher"], linewidth=0)
    axis.set_yticks(range(len(points)), [str(point.gpus) for point in points], color=INK)
    axis.set_ylabel("teacher GPUs", color=SOFT)
    axis.set_ylim(len(points) - 0.5, -0.6)
    axis.set_xlim(0, 1.03 * max(point.step for point in points))
    axis.xaxis.grid(True, color=GRID)
    names = {"sampling": PHASES["rollout"], "waits for the teacher": PALETTE[3], "training": PHASES["train"]}
    names |= {"the teacher scores": PHASES["teacher"]}
    marks = [axis.plot([], [], "s", color=colour, markersize=6)[0] for colour in names.values()]
    axis.legend(marks, names, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, labelcolor=SOFT)
