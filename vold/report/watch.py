"""A live run as a screenful for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vold.io import visible

from .compare import curve_keys
from .health import health_warnings, phases
from .read import RunRecord
from .style import format_duration, metric

LAST = 20  # steps that speed, phases and warnings are taken from
WIDTH = 30  # characters of a sparkline; the bar of phases has twice as many
SILENCE = 5  # times the slowest of the last steps without a new one: worth a warning
SPEED = ("tokens_per_second", "mfu", "peak_memory_gib")
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("blue", "green", "yellow", "cyan", "magenta", "red", "white")


def is_finished(run: RunRecord) -> bool:
    """Return whether the last step that the config plans is on file."""
    return bool(run.steps and run.planned_steps and run.steps[-1] >= run.planned_steps)


def view(run: RunRecord, *, silent: float = 0.0) -> RenderableType:
    """Render the screen. `silent`: seconds since the last step was written."""
    recent = replace(run, metrics={key: values[-LAST:] for key, values in run.metrics.items()})
    seconds = [value for _, value in recent.finite("seconds")]
    parts: list[RenderableType] = [_status_line(run, seconds, silent)]
    if run.steps:
        parts += ["", _metrics(run), "", *_phase_bar(recent)]
    return Group(*parts, "", *_warnings(run, seconds, silent))


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Means of `width` stretches of the values, from the lowest to the highest; a blank where none is finite."""
    length = max(1, math.ceil(len(values) / width))
    stretches = [[v for v in values[i : i + length] if math.isfinite(v)] for i in range(0, len(values), length)]
    means = [statistics.fmean(stretch) if stretch else math.nan for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span, top = min(finite), max(finite) - min(finite), len(_BLOCKS) - 1
    levels = [(m - low) / span if span else (top // 2) / top for m in means]
    return "".join(_BLOCKS[round(top * level)] if math.isfinite(level) else " " for level in levels)


def _status_line(run: RunRecord, seconds: Sequence[float], silent: float) -> RenderableType:
    done, planned = int(run.steps[-1]) if run.steps else 0, run.planned_steps
    cells: list[RenderableType] = [Text(visible(run.name), "bold"), Text(visible(run.verb))]
    cells.append(f"step {done} of {planned}" if planned else f"step {done}")
    if planned:
        cells.append(ProgressBar(planned, done, width=WIDTH // 2))
    if is_finished(run):
        cells.append(Text("finished", "bold green"))
    elif not run.steps:
        cells.append("waiting for the first step")
    elif mean := statistics.fmean(seconds) if seconds else 0.0:
        left = [f"{format_duration((planned - done) * mean)} left"] if planned else []
        cells += [f"{format_duration(mean)} a step", *left, f"last {format_duration(silent)} ago"]
    line = Table.grid(padding=(0, 2))
    line.add_row(*cells)
    return line


def _metrics(run: RunRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    for width, justify in ((16, "left"), (6, "right"), (WIDTH, "left"), (None, "left")):
        table.add_column(no_wrap=True, min_width=width, justify=justify)
    for key in [*curve_keys([run]), *SPEED]:
        if logged := [value for _, value in run.finite(key)]:
            described, values = metric(key), run.metrics[key]
            # sparse evaluations would be mostly blanks
            line = sparkline(values if 2 * len(logged) >= len(values) else logged)
            value = Text(described.format(logged[-1]), "bold")
            table.add_row(Text(visible(described.label)), value, Text(line, "cyan"), Text(described.unit, "dim"))
    return table


def _phase_bar(run: RunRecord) -> list[RenderableType]:
    """A bar of the phases' shares and its legend, of phases of a percent and more."""
    bar, legend = Text(), []
    for i, phase in enumerate(phase for phase in phases(run) if phase.share >= 0.01):
        colour = _COLOURS[i % len(_COLOURS)]
        bar.append("█" * round(2 * WIDTH * phase.share), colour)
        name = visible(phase.name).replace("_", " ")
        legend.append(Text.assemble(("■ ", colour), f"{name} {100 * phase.share:.0f} %", no_wrap=True))
    return [bar, Columns(legend, padding=(0, 2))] if bar else []


def _warnings(run: RunRecord, seconds: Sequence[float], silent: float) -> list[RenderableType]:
    lines = health_warnings(run, last=LAST)
    slowest = max(seconds, default=math.inf)
    if not is_finished(run) and silent > SILENCE * slowest:
        lines.append(
            f"No step for {format_duration(silent)}; the slowest of the last {LAST} took {format_duration(slowest)}. "
            "Look at: whether the run is still alive"
        )
    if lines:
        return [Text(visible(f"! {line}"), "yellow") for line in lines]
    return [Text(f"no warning in the last {LAST} steps", "dim")] if run.steps else []
