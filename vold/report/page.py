"""One self-contained HTML page about one run or several: no script, no network, no file beside it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vold.io import visible, write_atomically

from . import compare, health, outcome, plots, samples, style, summary_text, tables, timeline
from .published import compare_with_published
from .read import RunRecord, as_number, read_json, read_runs
from .tokens import SHADES

_VERBS = {"sft": "Stage 1: learning from the teacher's traces", "rl": "Stage 2: reinforcement learning"}
# what the template calls
_FUNCTIONS = (
    *(summary_text.lead_sentences, summary_text.stage_differences, summary_text.limitations),
    *(health.phases, health.summarise, health.keys_not_finite, timeline.step_timeline, timeline.step_figure),
    *(plots.accuracy_bars, plots.seeds_errorbars, style.metric, style.colours, compare_with_published),
)


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
    table = accuracies(evaluations, report)
    order = {model: i for i, model in enumerate(table.models)}
    evaluations.sort(key=lambda record: order.get(style.arm_of(record.name), len(order)))
    cells, trained = tables.seed_cells(seeds), [record for record in records if record.metrics]
    page = _environment().get_template("page.html.jinja")
    html = page.render(
        title=title,
        written=time.strftime("%Y-%m-%d %H:%M"),
        facts=facts,
        pipeline=health.as_phases(seconds if isinstance(seconds := facts.get("seconds"), Mapping) else {}),
        result=table,
        outcomes=outcome.outcomes(records, evaluations=len(table.models) < 2),
        complaints=outcome.unhealthy(records),
        watched=outcome.has_health(records),
        seeds=cells,
        seed_rows=seeds,
        seed_sets=tables.as_table(cells).sets,
        seed_count=max((len(mean.values) for row in cells.values() for mean in row.values()), default=0),
        runs=records,
        trained=trained,
        listed=[record for record in records if record.metrics or not record.evaluation_section("sets")],
        evaluated=[record for record in records if record.evaluation_section("sets")],
        kinds=[(record, *kind) for record in records for kind in tables.problem_kinds(record)],
        curves=_curves(trained),
        comparisons=compare.compare(trained),
        health=health.health_table(trained),
        problems=samples.shared_problems(evaluations),
        failures=samples.failed_image_problems(evaluations),
        sample_lists=samples.sample_lists(records),
        questions=samples.kept_questions(records),
        list_size=samples.PER_LIST,
        shades=SHADES,
        config_differences=compare.config_differences(records),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, visible(html, multiline=True))  # also what no filter of the page has seen
    return out


def accuracies(evaluations: Sequence[RunRecord], report: Mapping[str, Any] | None = None) -> tables.AccuracyTable:
    """The accuracies of report.json, or of the runs without one, with paired differences where the runs' samples allow
    it: what is clearly best is the same wherever the table is shown."""
    table = tables.as_table(report) if report else tables.table_of_runs(evaluations)
    return replace(table, pairs=summary_text.paired_differences(table, evaluations))


def inline_svg(svg: bytes) -> Markup:
    """A figure of vold.report as part of the page, in the page's colours, so that it follows light and dark."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r' d="[^"]*"', lambda path: _DIGITS.sub(r"\1", path.group()), text)  # to hundredths of a point
    text = re.sub(r'<g id="tooltip ([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same ids in every figure; nothing refers to them
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)  # as wide as its container
    return Markup(_COLOURS.sub(lambda colour: css_colour(colour.group()), text))


def css_colour(colour: str) -> str:
    """The page's variable for one of the report's colours."""
    return f"var(--{_VARIABLES[colour]})"


_DIGITS = re.compile(r"(\.\d\d)\d+")
_VARIABLES = {style.INK: "ink", style.SOFT: "soft", style.GRID: "grid"}
_VARIABLES |= {colour: f"run-{i}" for i, colour in enumerate(style.PALETTE)}
_VARIABLES |= {colour: f"phase-{i}" for i, colour in enumerate(style.PHASES.values())}
_COLOURS = re.compile("|".join(_VARIABLES))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vold.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {function.__name__: function for function in _FUNCTIONS}
    environment.filters |= {
        "number": lambda value: style.format_number(as_number(value)),
        "signed": lambda value: f"{value:+.2f}".replace("-", "−"),
        "duration": style.format_duration,
        "percent": lambda value, error=math.nan: tables.percent(as_number(value), as_number(error)),
        "visible": samples.excerpt,
        "label": style.label,
        "css": css_colour,
        "svg": inline_svg,
        "yaml": lambda config: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        "unbroken": lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%"),
    }
    return environment


def _report_json(runs: Sequence[Path]) -> dict[str, Any] | None:
    reports = (read_json(Path(path) / "report.json") for path in runs)
    return next((report for report in reports if report and isinstance(report.get("accuracy"), dict)), None)


def _curves(records: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """(title, [(text for screen readers, figure)]) for the runs of each verb."""
    groups = []
    for verb, runs in compare.by_verb(records).items():
        names = ", ".join(run.name for run in runs)
        keys = [key for key in compare.curve_keys(runs) if any(run.finite(key) for run in runs)]
        panels = [(f"{style.metric(key).label} by step: {names}", inline_svg(plots.curve(runs, key))) for key in keys]
        groups.append((_VERBS.get(verb, verb), panels))
    return [group for group in groups if group[1]]
