"""A live run as a screenful for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .browse import visible
from .compare import keys_of
from .health import alarms, amount, duration, phases
from .read import RunRecord
from .style import metric

LAST = 20  # steps that speed, phases and warnings are taken from
WIDTH = 30  # characters of a sparkline; the bar of phases has twice as many
QUIET = 5  # times the slowest of the last steps without a new one is worth a warning
SPEED = ("tokens_per_second", "mfu", "peak_memory_gib")
_BLOCKS = "▁▂▃▄▅▆▇█"
_PAINT = ("blue", "green", "yellow", "cyan", "magenta", "red", "white")


def is_finished(run: RunRecord) -> bool:
    """Whether the last step that the config plans is on file."""
    return bool(run.steps and run.planned_steps and run.steps[-1] >= run.planned_steps)


def view(run: RunRecord, *, silent: float = 0.0) -> RenderableType:
    """`silent`: seconds since the last step was written."""
    parts: list[RenderableType] = [_headline(run, silent)]
    if run.steps:
        parts += ["", _metrics(run), "", *_phases(recent(run))]
    return Group(*parts, "", *_warnings(run, silent))


def recent(run: RunRecord) -> RunRecord:
    """The run's last steps alone."""
    last = {key: values[-LAST:] for key, values in run.metrics.items()}
    return RunRecord(run.name, run.path, run.config, last)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Means of `width` stretches of the values, from the lowest to the highest; a blank where none is finite."""
    each = max(1, math.ceil(len(values) / width))
    stretches = [[v for v in values[i : i + each] if math.isfinite(v)] for i in range(0, len(values), each)]
    means = [statistics.fmean(stretch) if stretch else math.nan for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        " " if not math.isfinite(m) else _BLOCKS[round(top * (m - low) / span) if span else top // 2] for m in means
    )


def _headline(run: RunRecord, silent: float) -> RenderableType:
    done, planned = int(run.steps[-1]) if run.steps else 0, run.planned_steps
    line = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [
        Text(visible(run.name), "bold"),
        Text(visible(run.verb)),
        f"step {done}{f' of {planned}' if planned else ''}",
    ]
    if planned:
        cells.append(ProgressBar(planned, done, width=WIDTH // 2))
    if is_finished(run):
        cells.append(Text("finished", "bold green"))
    elif not run.steps:
        cells.append("waiting for the first step")
    elif each := _seconds(run):
        left = [f"{duration((planned - done) * each)} left"] if planned else []
        cells += [f"{duration(each)} a step", *left, f"last {duration(silent)} ago"]
    line.add_row(*cells)
    return line


def _seconds(run: RunRecord) -> float | None:
    """Of a step, lately."""
    found = [value for value in recent(run).metrics.get("seconds", ()) if math.isfinite(value)]
    return statistics.fmean(found) if found else None


def _metrics(run: RunRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=16)
    table.add_column(no_wrap=True, min_width=6, justify="right")
    table.add_column(no_wrap=True, min_width=WIDTH)
    table.add_column(no_wrap=True)
    for key in [*keys_of([run]), *SPEED]:
        values = run.metrics.get(key, [])
        logged = [value for value in values if math.isfinite(value)]
        if logged:
            shown = metric(key)
            # an evaluation now and then would be mostly blanks
            line = sparkline(values if 2 * len(logged) >= len(values) else logged)
            name, value = Text(visible(shown.label)), Text(amount(logged[-1], shown), "bold")
            table.add_row(name, value, Text(line, "cyan"), Text(shown.unit, "dim"))
    return table


def _phases(run: RunRecord) -> list[RenderableType]:
    """A bar of the phases' shares and its legend, those of a percent and more."""
    bar, legend = Text(), []
    for i, phase in enumerate(phase for phase in phases(run) if phase.share >= 0.01):
        colour = _PAINT[i % len(_PAINT)]
        bar.append("█" * round(2 * WIDTH * phase.share), colour)
        name = visible(phase.name).replace("_", " ")
        legend.append(Text.assemble(("■ ", colour), f"{name} {100 * phase.share:.0f} %", no_wrap=True))
    return [bar, Columns(legend, padding=(0, 2))] if bar else []


def _warnings(run: RunRecord, silent: float) -> list[RenderableType]:
    found = alarms(run, last=LAST)
    slowest = max((v for v in recent(run).metrics.get("seconds", ()) if math.isfinite(v)), default=math.inf)
    if not is_finished(run) and silent > QUIET * slowest:
        found.append(
            f"No step for {duration(silent)}; the slowest of the last {LAST} took {duration(slowest)}. "
            "Look at: whether the run is still alive"
        )
    if found:
        return [Text(f"! {line}", "yellow") for line in found]
    return [Text(f"no warning in the last {LAST} steps", "dim")] if run.steps else []
