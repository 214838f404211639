"""Accuracy as tables, and the one rule for "better": more than two standard errors of the difference."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .read import RunRecord, as_number, mappings_in
from .style import arm_of, label, ordered

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
    def verdict(self) -> str:
        if not math.isfinite(self.points) or not math.isfinite(self.stderr):
            return "not measured"
        if not self.clear:
            return "no clear difference"
        return "clear gain" if self.points > 0 else "clear loss"

    def __str__(self) -> str:
        """Signed points with their standard error: "+9.0 ± 2.1"."""
        if not math.isfinite(self.points):
            return "–"
        error = f" ± {100 * self.stderr:.1f}" if math.isfinite(self.stderr) else ""
        return f"{100 * self.points:+.1f}{error}".replace("-", "−")


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
        return ordered(self.accuracy, MODEL_ORDER)

    @property
    def sets(self) -> list[str]:
        return ordered(sorted({name for row in self.accuracy.values() for name in row}), _SET_ORDER)

    def value(self, model: str, name: str) -> float:
        return as_number(self.accuracy.get(model, {}).get(name))

    def error(self, model: str, name: str) -> float:
        """The given standard error, else the binomial one from n, else NaN."""
        error = as_number(self.stderr.get(model, {}).get(name))
        if math.isnan(error) and self.n.get(name):
            p = self.value(model, name)
            error = math.sqrt(p * (1 - p) / self.n[name]) if 0 <= p <= 1 else math.nan
        return error

    def cell(self, model: str, name: str) -> str:
        return percent(self.value(model, name), self.error(model, name))

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
        first, *others = self.ranking(name) or [None]
        gaps = [self.difference(first, other, name) for other in others]
        return first if gaps and all(gap.clear and gap.points > 0 for gap in gaps) else None


def as_table(report: Mapping[str, Any] | AccuracyTable) -> AccuracyTable:
    """report.json, or its `accuracy` alone, as an AccuracyTable; an unfinished report may hold null for a model."""
    if isinstance(report, AccuracyTable):
        return report
    if "accuracy" not in report:
        return AccuracyTable(mappings_in(report))
    n = {name: int(value) for name, value in (report.get("n") or {}).items() if math.isfinite(as_number(value))}
    return AccuracyTable(mappings_in(report["accuracy"]), mappings_in(report.get("stderr")), n)


def table_of_runs(runs: Sequence[RunRecord]) -> AccuracyTable:
    """Build the table from the evaluation.json files of the runs."""
    models = {arm_of(run.name): sets for run in runs if (sets := run.evaluation_section("sets"))}
    accuracy, stderr = (
        {model: {name: as_number(result.get(key)) for name, result in sets.items()} for model, sets in models.items()}
        for key in ("accuracy", "stderr")
    )
    counts = {name: as_number(result.get("n")) for sets in models.values() for name, result in sets.items()}
    return AccuracyTable(accuracy, stderr, {name: int(count) for name, count in counts.items() if math.isfinite(count)})


def problem_kinds(run: RunRecord) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(set, kind of problem, its accuracy): perception and reasoning first, then the data set's own categories."""
    return [
        (name, kind, numbers)
        for name, result in run.evaluation_section("sets").items()
        for section in ("skills", "categories")
        for kind, numbers in mappings_in(result.get(section)).items()
    ]


def percent(value: float, error: float = math.nan) -> str:
    """Percent with one decimal: "53.8 ± 2.5"; "–" where nothing was measured."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} ± {100 * error:.1f}" if math.isfinite(error) else f"{100 * value:.1f}"


def accuracy_table(accuracy: Mapping[str, Any] | AccuracyTable, stderr: Mapping[str, Any] | None = None) -> str:
    """Markdown, aligned so that it also reads as plain text. Bold: clearly better than every other model."""
    table = as_table(accuracy) if stderr is None else AccuracyTable(accuracy, stderr)
    best = {name: table.best(name) for name in table.sets}
    rows = [
        [label(m), *(f"**{table.cell(m, s)}**" if best[s] == m else table.cell(m, s) for s in table.sets)]
        for m in table.models
    ]
    return markdown(["accuracy, %", *table.sets], rows)


@dataclass(frozen=True)
class Mean:
    """The mean of independent values; stderr: sample standard deviation / √n, NaN for a single value."""

    values: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def stderr(self) -> float:
        n = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(n) if n > 1 else math.nan

    def __str__(self) -> str:
        return percent(self.value, self.stderr)


def seed_cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mean]]:
    """arm -> set -> mean over seeds. A row is {"seed", "arm", "text", "image", …} or one seed's whole report.json."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        flat = {str(row.get("arm", "?")): {k: v for k, v in row.items() if k not in ("arm", "seed")}}
        for arm, sets in (row["accuracy"] if isinstance(row.get("accuracy"), Mapping) else flat).items():
            for name, value in sets.items():
                if math.isfinite(number := as_number(value)):
                    values.setdefault(arm, {}).setdefault(name, []).append(number)
    order = as_table(values).models
    return {arm: {name: Mean(tuple(numbers)) for name, numbers in values[arm].items()} for arm in order}


def seeds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± standard error over seeds per arm, and the number of seeds."""
    cells = seed_cells(rows)
    sets = as_table(cells).sets
    body = [
        [label(arm), str(max(len(c.values) for c in row.values())), *(str(row.get(name, Mean())) for name in sets)]
        for arm, row in cells.items()
    ]
    return markdown(["accuracy, %", "seeds", *sets], body)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file with a header; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns: the first to the left, the others to the right."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))
