"""Time by phase of a profiled run's steps: medians per phase and rank, as a table, CSV and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from matplotlib.axes import Axes
from rich.table import Column, Table

from . import tables
from .drawing import Format, add_legend, figure_bytes, new_figure, report_style
from .style import INK, PHASES, ordered

MetricRow = Mapping[str, float]
OTHER, STEP = "other", "step"
HEADER = ("phase", "rank", "seconds", "share", "tokens/s", "MFU", "memory GiB")
# the metric that counts the tokens a phase works on, over all ranks
TOKENS = {"rollout": "response_tokens", "grade": "response_tokens", "teacher": "kl_tokens", STEP: "response_tokens"}
TOKENS |= dict.fromkeys(("student_forward", "student_backward"), "gradient_tokens")
# share of the layers' work in training (`train_tflop` without the head's) that a phase does, and of the head's: the
# fused heads form their gradients in the forward phase
WORK = {"student_forward": (1 / 3, 1.0), "student_backward": (2 / 3, 0.0), STEP: (1.0, 1.0)}


@dataclass(frozen=True)
class PhaseRow:
    """Medians of one phase on one rank; None where a number has no meaning.

    tokens_per_second   of all ranks together
    mfu                 useful FLOP/s of the phase over the peak of all ranks
    """

    rank: int
    phase: str
    seconds: float
    share: float
    tokens_per_second: float | None
    mfu: float | None
    memory_gib: float | None

    def cells(self) -> list[str]:
        """Texts in the order of HEADER."""
        numbers = ((self.tokens_per_second, ",.0f"), (self.mfu, ".1%"), (self.memory_gib, ".2f"))
        texts = ["" if value is None else format(value, style) for value, style in numbers]
        return [self.phase, str(self.rank), f"{self.seconds:.4g}", f"{self.share:.1%}", *texts]


def phase_rows(
    ranks: Sequence[Sequence[MetricRow]], peak_flops: float | None, head_flops: float = 0.0
) -> list[PhaseRow]:
    """`ranks[r]`: rank r's rows of metrics, one per step. `peak_flops`: of all ranks together. `head_flops`: of the
    head, for each token with a gradient, both passes."""
    return [row for rank, steps in enumerate(ranks) for row in _rank_rows(rank, steps, peak_flops, head_flops)]


def split_step(row: MetricRow) -> dict[str, float]:
    """Seconds of each phase of one step, in the step's order; they add up to the step."""
    seconds = {key.removeprefix("seconds_"): value for key, value in row.items() if key.startswith("seconds_")}
    seconds.pop("train", None)  # its parts are there
    parts = {name: seconds[name] for name in ordered(seconds, PHASES)}
    return parts | {OTHER: max(row["seconds"] - sum(parts.values()), 0.0)}


def _rank_rows(rank: int, steps: Sequence[MetricRow], peak_flops: float | None, head_flops: float) -> list[PhaseRow]:
    splits = [split_step(step) | {STEP: step["seconds"]} for step in steps]
    whole = statistics.median(split[STEP] for split in splits)
    rows = []
    for name in splits[0]:
        seconds = statistics.median(split.get(name, 0.0) for split in splits)
        tokens = _median(steps, TOKENS.get(name, ""))
        work = _work(steps, name, head_flops)
        memory = _median(steps, "peak_memory_gib" if name == STEP else f"memory_gib_{name}")
        rate = tokens / seconds if tokens and seconds else None
        mfu = work / (seconds * peak_flops) if work and seconds and peak_flops else None
        rows.append(PhaseRow(rank, name, seconds, seconds / whole, rate, mfu, memory))
    return rows


def _work(steps: Sequence[MetricRow], name: str, head_flops: float) -> float | None:
    """Useful FLOPs of a phase, over all ranks."""
    total = _median(steps, "train_tflop")
    if name not in WORK or total is None:
        return None
    head = min(head_flops * (_median(steps, "gradient_tokens") or 0.0), 1e12 * total)
    of_layers, of_head = WORK[name]
    return of_layers * (1e12 * total - head) + of_head * head


def _median(steps: Sequence[MetricRow], key: str) -> float | None:
    values = [step[key] for step in steps if key in step]
    return statistics.median(values) if values else None


def to_markdown(rows: Sequence[PhaseRow], notes: Sequence[str]) -> str:
    return "\n".join([*notes, "", tables.markdown(HEADER, [row.cells() for row in rows]), ""])


def to_rich(rows: Sequence[PhaseRow]) -> Table:
    columns = [Column(name, justify="left" if name == "phase" else "right") for name in HEADER]
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row.cells(), style="bold" if row.phase == STEP else None)
    return table


def to_csv(rows: Sequence[PhaseRow]) -> str:
    return tables.csv_text([field.name for field in fields(PhaseRow)], map(astuple, rows))


@report_style
def phase_figure(ranks: Sequence[Sequence[MetricRow]], *, fmt: Format = "svg") -> bytes:
    """Left: rank 0's steps, phases stacked. Right: every rank's mean step (means of parts add up, medians do not)."""
    splits = [[split_step(step) for step in steps] for steps in ranks]
    names = dict.fromkeys(name for steps in splits for step in steps for name in step if step[name] > 0)
    colours = {name: PHASES[name] for name in PHASES if name in names}
    means = [{n: statistics.fmean(step.get(n, 0.0) for step in steps) for n in colours} for steps in splits]
    figure = new_figure(9.6, 1.9 + 0.34 * max(len(ranks[0]), len(ranks), 3))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_stacks(left, splits[0], [str(int(row["step"])) for row in ranks[0]], colours)
    _draw_stacks(right, means, [f"rank {rank}" for rank in range(len(ranks))], colours)
    left.set(title="Rank 0, step by step", ylabel="step")
    right.set(title="Mean step of each rank")
    add_legend(figure, colours)
    return figure_bytes(figure, fmt)


def _draw_stacks(
    axis: Axes, stacks: Sequence[Mapping[str, float]], labels: Sequence[str], colours: Mapping[str, str]
) -> None:
    ends = [0.0] * len(stacks)
    for name, colour in colours.items():
        widths = [stack.get(name, 0.0) for stack in stacks]
        bars = axis.barh(
            range(len(stacks)), widths, left=ends, height=0.66, color=colour, edgecolor="white", linewidth=0.6
        )
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axis.bar_label(bars, [f"{end:.3g} s" for end in ends], padding=4, color=INK, fontsize=8.5)
    axis.set_yticks(range(len(stacks)), labels)
    axis.set(xlabel="seconds", ylim=(len(stacks) - 0.4, -0.6), xlim=(0, 1.16 * max(ends)))
    axis.xaxis.grid(True)
