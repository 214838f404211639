"""Accuracy as tables, and the one rule for "better": more than two standard errors of the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from .read import RunRecord, as_number
from .style import arm_of, label

CLEAR = 2.0  # standard errors
MODEL_ORDER = ("base", "sft", "grpo", "vold")
_SET_ORDER = ("text", "image")


@dataclass(frozen=True)
class Difference:
    """`points` in accuracy (0.09 is nine points), with its standard error; `paired` over the same problems."""

    points: float
    stderr: float
    paired: bool = False

    @property
    def clear(self) -> bool:
        return abs(self.points) > CLEAR * self.stderr

    @property
    def word(self) -> str:
        if not math.isfinite(self.points) or not math.isfinite(self.stderr):
            return "not measured"
        if not self.clear:
            return "no clear difference"
        return "clear gain" if self.points > 0 else "clear loss"


@dataclass(frozen=True)
class AccuracyTable:
    """model -> set -> accuracy in [0, 1], its standard error, and the number of problems.

    pairs: (new, old, set) -> difference over the problems both models answered, where the samples allow it.
    """

    accuracy: Mapping[str, Mapping[str, float]]
    stderr: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str, str], Difference] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        known = [name for name in MODEL_ORDER if name in self.accuracy]
        return known + [name for name in self.accuracy if name not in known]

    @property
    def sets(self) -> list[str]:
        seen = dict.fromkeys(name for row in self.accuracy.values() for name in row)
        return [name for name in _SET_ORDER if name in seen] + sorted(set(seen) - set(_SET_ORDER))

    def value(self, model: str, name: str) -> float:
        return as_number(self.accuracy.get(model, {}).get(name))

    def error(self, model: str, name: str) -> float:
        """As given, else the binomial standard error from n, else NaN."""
        error = as_number(self.stderr.get(model, {}).get(name))
        if math.isnan(error) and self.n.get(name):
            p = self.value(model, name)
            error = math.sqrt(p * (1 - p) / self.n[name]) if 0 <= p <= 1 else math.nan
        return error

    def difference(self, new: str, old: str, name: str) -> Difference:
        """new − old on one set: paired where possible, else with independent standard errors."""
        if pair := self.pairs.get((new, old, name)):
            return pair
        points = self.value(new, name) - self.value(old, name)
        return Difference(points, math.hypot(self.error(new, name), self.error(old, name)))

    def ranking(self, name: str) -> list[str]:
        measured = [model for model in self.models if math.isfinite(self.value(model, name))]
        return sorted(measured, key=lambda model: -self.value(model, name))

    def best(self, name: str) -> str | None:
        """The model that is clearly better than every other on this set, if there is one."""
        order = self.ranking(name)
        if len(order) < 2:
            return None
        won = all((gap := self.difference(order[0], other, name)).clear and gap.points > 0 for other in order[1:])
        return order[0] if won else None


def as_table(report: Mapping[str, Any] | AccuracyTable) -> AccuracyTable:
    """report.json, or its `accuracy` alone, as an AccuracyTable."""
    if isinstance(report, AccuracyTable):
        return report
    if "accuracy" not in report:
        return AccuracyTable(accuracy=_rows(report))
    n = {name: int(value) for name, value in (report.get("n") or {}).items() if math.isfinite(as_number(value))}
    return AccuracyTable(accuracy=_rows(report["accuracy"]), stderr=_rows(report.get("stderr")), n=n)


def table_of_runs(runs: Sequence[RunRecord]) -> AccuracyTable:
    """The table that the runs' own evaluation.json files make."""
    accuracy: dict[str, dict[str, float]] = {}
    stderr: dict[str, dict[str, float]] = {}
    n: dict[str, int] = {}
    for run in runs:
        for name, result in evaluation_sets(run).items():
            accuracy.setdefault(arm_of(run.name), {})[name] = as_number(result.get("accuracy"))
            stderr.setdefault(arm_of(run.name), {})[name] = as_number(result.get("stderr"))
            if math.isfinite(count := as_number(result.get("n"))):
                n[name] = int(count)
    return AccuracyTable(accuracy, stderr, n)


def evaluation_sets(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """set -> its results, those that are well formed."""
    sets = (run.evaluation or {}).get("sets")
    return {k: v for k, v in sets.items() if isinstance(v, Mapping)} if isinstance(sets, Mapping) else {}


def kinds(run: RunRecord) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(set, kind of problem, its accuracy): perception and reasoning first, then the data set's own categories."""
    found = []
    for name, result in evaluation_sets(run).items():
        for table in (result.get("skills"), result.get("categories")):
            rows = table.items() if isinstance(table, Mapping) else ()
            found += [(name, kind, numbers) for kind, numbers in rows if isinstance(numbers, Mapping)]
    return found


def benchmarks(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """judge -> set -> numbers, of VLMEvalKit."""
    found = (run.evaluation or {}).get("benchmarks")
    return {k: v for k, v in found.items() if isinstance(v, Mapping)} if isinstance(found, Mapping) else {}


def cell(value: float, error: float) -> str:
    """Percent with one decimal: "53.8 ± 2.5"; "–" where nothing was measured."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" if not math.isfinite(error) else f"{100 * value:.1f} ± {100 * error:.1f}"


def accuracy_table(accuracy: Mapping[str, Any] | AccuracyTable, stderr: Mapping[str, Any] | None = None) -> str:
    """Markdown, aligned so that it also reads as plain text. Bold: clearly better than every other model."""
    table = _table(accuracy, stderr)
    rows = [[label(model), *(_marked(table, model, name, "**") for name in table.sets)] for model in table.models]
    return markdown(["accuracy, %", *table.sets], rows)


def accuracy_rich(accuracy: Mapping[str, Any] | AccuracyTable, stderr: Mapping[str, Any] | None = None) -> Table:
    """The same table for `rich.print`."""
    table = _table(accuracy, stderr)
    view = Table("accuracy, %", title_justify="left")
    for name in table.sets:
        view.add_column(name, justify="right")
    for model in table.models:
        cells = (cell(table.value(model, name), table.error(model, name)) for name in table.sets)
        styled = (
            f"[bold]{text}[/bold]" if table.best(name) == model else text
            for text, name in zip(cells, table.sets, strict=True)
        )
        view.add_row(escape(label(model)), *styled)
    return view


@dataclass(frozen=True)
class SeedCell:
    """One arm on one set over seeds: s.e. is the sample standard deviation / √n, NaN for a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def stderr(self) -> float:
        n = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(n) if n > 1 else math.nan


def seed_cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, SeedCell]]:
    """arm -> set -> SeedCell. A row is {"seed", "arm", "text", "image", …} or one seed's whole report.json."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for arm, sets in _arms(row).items():
            for name, value in sets.items():
                if math.isfinite(number := as_number(value)):
                    values.setdefault(arm, {}).setdefault(name, []).append(number)
    order = as_table(values).models
    return {arm: {name: SeedCell(tuple(found)) for name, found in values[arm].items()} for arm in order}


def seeds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± standard error over seeds per arm, and how many seeds."""
    cells = seed_cells(rows)
    sets = as_table(cells).sets
    body = []
    for arm, row in cells.items():
        seeds = max(len(found.values) for found in row.values())
        found = [row.get(name, SeedCell(())) for name in sets]
        body.append([label(arm), str(seeds), *(cell(one.mean, one.stderr) for one in found)])
    return markdown(["accuracy, %", "seeds", *sets], body)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns: the first to the left, the others to the right."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def _arms(row: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(row.get("accuracy"), Mapping):
        return row["accuracy"]
    return {str(row.get("arm", "?")): {k: v for k, v in row.items() if k not in ("arm", "seed")}}


def _rows(table: Any) -> dict[str, Mapping[str, Any]]:
    """The rows that are there: an unfinished pipeline may have written null for a model."""
    return {model: row for model, row in (table or {}).items() if isinstance(row, Mapping)}


def _table(accuracy: Mapping[str, Any] | AccuracyTable, stderr: Mapping[str, Any] | None) -> AccuracyTable:
    return as_table(accuracy) if stderr is None else AccuracyTable(accuracy=accuracy, stderr=stderr)


def _marked(table: AccuracyTable, model: str, name: str, mark: str) -> str:
    text = cell(table.value(model, name), table.error(model, name))
    return f"{mark}{text}{mark}" if table.best(name) == model else text
