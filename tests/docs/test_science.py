"""docs/science.md has the numbers of the results beside it, docs/science/*.jsonl, and of nothing else.

WRITE=1 python -m pytest tests/docs/test_science.py      writes its tables anew (and the figures)
"""

from __future__ import annotations

import json
import os
import re

import pytest
from commands import ROOT

from vold.miniature.science.protocol import Part, part_names, part_path
from vold.miniature.science.report import curves, figure, tables
from vold.miniature.science.results import Result, findings
from vold.report.tables import markdown

PAGE, DATA = ROOT / "docs" / "science.md", ROOT / "docs" / "science"
WRITE = bool(os.environ.get("WRITE"))
RUN = [name for name in part_names() if (DATA / f"{name}.jsonl").exists()]


def results(name: str) -> list[Result]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def sweeps(name: str) -> dict:
    return json.loads((DATA / f"{name}-sweeps.json").read_text())


def section(name: str) -> re.Match[str]:
    """The generated lines between a mark and its end."""
    mark = f"<!-- {name}: written by tests/docs/test_science.py -->\n\n"
    match = re.search(re.escape(mark) + r"(.*?)\n*<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert match, f"docs/science.md has no section {name}: add {mark.strip()} … <!-- end -->"
    return match


def compare(name: str, wanted: str) -> None:
    match = section(name)
    if WRITE:
        text = PAGE.read_text()
        PAGE.write_text(text[: match.start(1)] + wanted + "\n" + text[match.end(1) :])
    else:
        assert match[1] == wanted


@pytest.mark.parametrize("name", RUN)
def test_a_parts_tables_are_those_of_its_results(name):
    part, swept = Part.load(part_path(name)), sweeps(name)
    assert {r["condition"] for r in results(name)} <= part.conditions.keys(), "results of another design"
    compare(name, tables(part, results(name), swept["rates"], swept["scores"]))
    if WRITE:
        (DATA / f"{name}.png").write_bytes(figure(part, results(name), "png"))
        if part.curve_every:
            (DATA / f"{name}-curves.png").write_bytes(curves(part, results(name), "png"))


def test_the_page_says_what_has_been_run():
    rows = []
    for name in part_names():
        part = Part.load(part_path(name))
        wanted = sum(len(part.arms_of(condition)) * len(part.seeds) for condition in part.conditions.values())
        done = sum(r["arm"] in part.arms for r in results(name)) if name in RUN else 0
        hours = f"{sweeps(name)['cpu_seconds'] / 3600:.1f}" if name in RUN else "–"
        stated = f"{len(findings(results(name), part)) if name in RUN else 0} of {len(part.family)}"
        rows.append([part.claim.partition(" (")[0], f"`{name}`", f"{done} of {wanted}", stated, hours])
    header = ["claim", "part", "runs", "comparisons", "CPU-hours"]
    compare("state", markdown(header, rows))


@pytest.mark.parametrize("name", RUN)
def test_a_part_that_has_been_run_is_told(name):
    text = PAGE.read_text()
    assert f"science/{name}.png" in text and len(section(name)[1]) > 100
