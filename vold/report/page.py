"""One self-contained HTML page about one run or several: no script, no network, no file beside it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import browse, health, plots, tables, timeline, tokens, words
from .compare import compare, keys_of
from .published import beside_published
from .read import RunRecord, as_number, flatten, read_json, read_runs
from .style import GRID, INK, PALETTE, SOFT, arm_of, colours, label, metric

_VERBS = {"sft": "Stage 1: learning from the teacher's traces", "rl": "Stage 2: reinforcement learning"}


@dataclass(frozen=True)
class Run:
    """A run as the template reads it."""

    record: RunRecord
    colour: str
    steps: str
    best: str  # the checkpoint that evaluation.best keeps
    duration: str
    throughput: str
    memory: str
    phases: list[health.Phase]
    timeline: timeline.Timeline | None
    unfinite: list[str]
    config: str
    evaluation: Mapping[str, Mapping[str, Any]]
    kinds: list[tuple[str, str, Mapping[str, Any]]]  # set, kind of problem, its accuracy
    benchmarks: tuple[list[str], list[list[str]]] | None  # beside the paper's


@dataclass(frozen=True)
class CurveGroup:
    title: str
    names: list[str]
    panels: list[tuple[str, Markup]]  # what a screen reader says, and the figure


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str,
    accuracy: Mapping[str, Any] | None = None,
    seeds: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page about `runs` (run directories or folders of them) to `out`, and return `out`.

    accuracy   report.json, or its `accuracy` alone; by default a report.json in one of `runs`, else evaluation.json
    seeds      rows {"seed", "arm", set: accuracy, …} or one report.json per seed
    facts      {"versions": {...}, "commit": ..., "seconds": {phase: s}, ...}; by default from report.json
    """
    records = read_runs(runs)
    report = accuracy if accuracy is not None else _report_json(runs)
    facts = facts if facts is not None else (report if report and "accuracy" in report else {})
    evaluations = [record for record in records if record.evaluation or record.verb == "eval"]
    table = tables.as_table(report) if report else tables.table_of_runs(evaluations)
    table = replace(table, pairs=words.paired_differences(table, evaluations))
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            written=time.strftime("%Y-%m-%d %H:%M"),
            facts=facts,
            pipeline=health.as_phases(seconds if isinstance(seconds := facts.get("seconds"), Mapping) else {}),
            accuracy=_accuracy(table, seeds),
            seeds=_seeds(seeds),
            runs=_runs(records),
            curves=_curves(records),
            comparisons=compare(records),
            vitals=health.vitals([record for record in records if record.metrics]),
            problems=browse.problems(_in_order(evaluations, table)),
            galleries=browse.galleries(_in_order(evaluations, table)),
            shelves=browse.shelves(records),
            shelf_size=browse.PER_SHELF,
            shades=tokens.STEPS,
            changes=_changes(records),
        )
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def inline_svg(svg: bytes) -> Markup:
    """A figure of ours as part of the page: its colours become the page's, so that it follows light and dark."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r' d="[^"]*"', lambda path: _DIGITS.sub(r"\1", path.group()), text)  # to hundredths of a point
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same ids in every figure; nothing refers to them
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)  # as wide as its place
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)


_DIGITS = re.compile(r"(\.\d\d)\d+")
_VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid"} | {colour: f"run-{i}" for i, colour in enumerate(PALETTE)}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vold.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": lambda value: health.number(as_number(value)),
        "amount": health.amount,
        "limit": health.limit_text,
        "signed": lambda value: f"{value:+.2f}".replace("-", "−"),
        "duration": health.duration,
        "difference": words.difference_text,
        "percent": lambda value, error=math.nan: tables.cell(as_number(value), as_number(error)),
        "visible": browse.visible,
        "label": label,
        "unbroken": lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%"),
    }
    return environment


def _report_json(runs: Sequence[Path]) -> dict[str, Any] | None:
    found = (read_json(Path(path) / "report.json") for path in runs)
    return next((report for report in found if report and isinstance(report.get("accuracy"), dict)), None)


def _accuracy(table: tables.AccuracyTable, seeds: Sequence[Any]) -> dict[str, Any] | None:
    if not table.sets:
        return None
    paint = colours(table.models)
    repeats = max((len(c.values) for row in tables.seed_cells(seeds).values() for c in row.values()), default=0)
    rows = [
        {
            "model": model,
            "colour": _variable(paint[model]),
            "cells": [
                {"text": tables.cell(table.value(model, s), table.error(model, s)), "best": table.best(s) == model}
                for s in table.sets
            ],
        }
        for model in table.models
    ]
    return {
        "sets": table.sets,
        "rows": rows,
        "figure": inline_svg(plots.accuracy_bars(table)),
        "headline": words.headline(table),
        "steps": words.steps(table),
        "caveats": words.caveats(table, seeds=repeats),
    }


def _seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    cells = tables.seed_cells(rows)
    if not cells:
        return None
    sets = tables.as_table(cells).sets
    body = [
        (arm, [(row[name], tables.cell(row[name].mean, row[name].stderr)) if name in row else None for name in sets])
        for arm, row in cells.items()
    ]
    return {"sets": sets, "rows": body, "figure": inline_svg(plots.seeds_errorbars(rows))}


def _runs(records: Sequence[RunRecord]) -> list[Run]:
    paint = colours([record.name for record in records])
    return [_run(record, _variable(paint[record.name])) for record in records]


def _run(record: RunRecord, colour: str) -> Run:
    done, planned = len(record.steps), record.planned_steps
    speed, memory = health.vital(record, "tokens_per_second"), health.vital(record, "peak_memory_gib")
    times = health.phases(record)
    return Run(
        record=record,
        colour=colour,
        steps="–" if not done else f"{done} of {planned}" if planned and planned != done else str(done),
        best=f"step {record.best[1]:g} ({metric(record.best[0]).label})" if record.best else "",
        duration=health.duration(sum(phase.seconds for phase in times)) if times else "–",
        throughput=health.number(speed.median) if speed else "–",
        memory=health.number(memory.worst) if memory else "–",
        phases=times,
        timeline=timeline.timeline(record),
        unfinite=health.unfinite(record),
        config=yaml.safe_dump(dict(record.config), sort_keys=False, allow_unicode=True) if record.config else "",
        evaluation=tables.evaluation_sets(record),
        kinds=tables.kinds(record),
        benchmarks=beside_published(found) if (found := tables.benchmarks(record)) else None,
    )


def _curves(records: Sequence[RunRecord]) -> list[CurveGroup]:
    groups = []
    for verb in dict.fromkeys(record.verb for record in records):
        same = [record for record in records if record.verb == verb and record.metrics]
        keys = [key for key in keys_of(same) if any(plots.has(record, key) for record in same)]
        names = [record.name for record in same]
        panels = [(f"{metric(k).label} by step: {', '.join(names)}", inline_svg(plots.curve(same, k))) for k in keys]
        if panels:
            groups.append(CurveGroup(_VERBS.get(verb, verb), names, panels))
    return groups


def _in_order(evaluations: Sequence[RunRecord], table: tables.AccuracyTable) -> list[RunRecord]:
    order = {model: i for i, model in enumerate(table.models)}
    return sorted(evaluations, key=lambda record: order.get(arm_of(record.name), len(order)))


def _changes(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each verb with several runs: the config keys on which they differ."""
    found = []
    for verb in dict.fromkeys(record.verb for record in records):
        same = [record for record in records if record.verb == verb and record.config]
        flat = [flatten(record.config) for record in same]
        keys = dict.fromkeys(key for config in flat for key in config)
        rows = [(key, [_leaf(config, key) for config in flat]) for key in keys]
        rows = [(key, values) for key, values in rows if len(set(values)) > 1]
        if rows:
            found.append({"verb": verb, "names": [record.name for record in same], "rows": rows})
    return found


def _leaf(config: Mapping[str, Any], key: str) -> str:
    return "–" if key not in config else "null" if config[key] is None else browse.visible(config[key])


def _variable(colour: str) -> str:
    return f"var(--{_VARIABLES[colour]})"
