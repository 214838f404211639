"""docs/science.md has the numbers of the results beside it, docs/science/*.jsonl, and of nothing else.

WRITE=1 python -m pytest tests/docs/test_science.py      writes its tables anew (and the figures)
"""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from commands import ROOT

from vold.miniature import world as arithmetic
from vold.miniature.check import world_facts
from vold.miniature.data import write_held_out
from vold.miniature.measure import expression_of, load_text_items
from vold.miniature.science.budget import predicted_hours
from vold.miniature.science.protocol import START, Part, part_names, part_path
from vold.miniature.science.report import curves, figure, percent, points, tables
from vold.miniature.science.results import Result, accuracy, answers, counted, findings, read_published, training_of
from vold.miniature.science.runs import design
from vold.miniature.science.statistics import crossed
from vold.miniature.worlds import fact_table
from vold.report.style import label
from vold.report.tables import markdown

PAGE, DATA = ROOT / "docs" / "science.md", ROOT / "docs" / "science"
WRITE = bool(os.environ.get("WRITE"))
RUN = [name for name in part_names() if (DATA / f"{name}.jsonl").exists()]


def results(name: str) -> list[Result]:
    return read_published(DATA / f"{name}.jsonl")


def runs_that_count(name: str) -> list[Result]:
    return counted(results(name), Part.load(part_path(name)))


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
        PAGE.write_text(text[: match.start(1)] + wanted + "\n\n<!-- end -->" + text[match.end() :])
    else:
        assert match[1] == wanted


@pytest.mark.parametrize("name", RUN)
def test_a_parts_tables_are_those_of_its_results(name):
    part = Part.load(part_path(name))
    for r in results(name):
        training = training_of(r)
        stated = {"steps": part.steps_of(training.condition), "design": design(part, training)}
        assert stated | r == r | stated, f"{training.name} is of other settings"
    compare(name, tables(part, results(name)))
    if WRITE:
        (DATA / f"{name}.png").write_bytes(figure(part, results(name), "png"))
        if part.curve_every:
            (DATA / f"{name}-curves.png").write_bytes(curves(part, results(name), "png"))


def test_the_page_says_what_has_been_run():
    rows = []
    for name in part_names():
        part = Part.load(part_path(name))
        wanted = sum(len(part.arms_of(condition)) * len(part.seeds) for condition in part.conditions.values())
        done = sum(r["arm"] in part.arms for r in runs_that_count(name)) if name in RUN else 0
        hours = f"{sum(r['cpu_seconds'] for r in results(name)) / 3600:.1f}" if name in RUN else "–"
        stated = f"{len(findings(runs_that_count(name), part)) if name in RUN else 0} of {len(part.family)}"
        hours_of = predicted_hours(part)
        predicted = f"{hours_of['sweep'] + hours_of['counted']:.1f}"
        rows.append([part.claim.partition(" (")[0], f"`{name}`", f"{done} of {wanted}", stated, predicted, hours])
    header = ["claim", "part", "runs", "comparisons", "CPU-hours, predicted", "spent"]
    compare("state", markdown(header, rows))


def test_the_worlds_are_what_was_measured():
    compare("worlds", "\n".join(f"- {world_facts(path)}" for path in sorted((DATA / "worlds").glob("*.json"))))


@pytest.mark.parametrize("name", RUN)
def test_a_part_that_has_been_run_is_told(name):
    text = PAGE.read_text()
    assert f"science/{name}.png" in text and len(section(name)[1]) > 100


def test_where_the_mask_helps(tmp_path):
    """Text problems by whether they meet a fact that the teacher holds wrong."""
    part, found = Part.load(part_path("mask")), runs_that_count("mask")
    problems = load_text_items(write_held_out(tmp_path / "held-out", seed=0) / "test_text.json")
    expressions = [expression_of(problem.messages[0]["content"]) for problem in problems]
    rows = []
    for condition in ("teacher 84 %", "teacher 70 %", "70 %, 150 steps"):
        world = part.conditions[condition].world
        assert world and world.seed == 0
        teachers_facts = fact_table(world)
        wrong = np.array([teachers_facts.solve(one) != arithmetic.solve(one) for one in expressions])
        halves = (wrong, ~wrong)
        right = {arm: answers(found, condition, arm, "text") for arm in (START, "grpo", "vold-unmasked", "vold")}
        scores = {arm: 100.0 * np.stack([run[seed] for seed in part.seeds]) for arm, run in right.items()}
        for arm, score in scores.items():
            rows.append([condition, label(arm), *(percent(crossed(score[:, half])) for half in halves)])
        gain = scores["vold"] - scores["vold-unmasked"]
        differences = [points(crossed(gain[:, half])) for half in halves]
        rows.append([f"{condition}: {100 * wrong.mean():.0f} % wrong", "VOLD − VOLD without mask", *differences])
    compare("mask by facts", markdown(["condition", "text, %", "teacher's facts wrong", "right"], rows))


@pytest.mark.parametrize("page", ["docs/science.md", "README.md"])
def test_a_difference_that_is_quoted_is_in_a_table(page):
    """Those with an interval; the README may also quote other pages."""
    interval = re.compile(r"[+−][\d.]+ \[[−\d.]+, [−\d.]+\]")
    told = " ".join(" ".join((ROOT / "docs" / f"{p}.md").read_text().split()) for p in ("science", "teachers"))
    tables_only = " ".join(line for line in PAGE.read_text().splitlines() if line.startswith("|"))
    quoted = interval.findall(" ".join((ROOT / page).read_text().split()))
    assert quoted and all(one in (told if page == "README.md" else tables_only) for one in quoted)


def test_the_readmes_rows_are_those_of_the_mask():
    """Accuracies by arm after 150 steps with the teacher that is right on 70 %."""
    part, found = Part.load(part_path("mask")), runs_that_count("mask")
    section_of_results = (ROOT / "README.md").read_text().partition("## Results")[2].partition("## Documentation")[0]
    rows = re.findall(
        r"^\| ([^|]+) \| (\d[\d.]* ± [\d.]+) \| (\d[\d.]* ± [\d.]+) \|$", section_of_results, re.MULTILINE
    )
    arms = {"SFT": START, "GRPO": "grpo", "VOLD without mask": "vold-unmasked", "VOLD": "vold"}
    assert [name.removeprefix("SFT + ") for name, *_ in rows] == list(arms)
    for name, *shown in rows:
        arm = arms[name.removeprefix("SFT + ")]
        wanted = [percent(accuracy(found, "70 %, 150 steps", arm, measure)) for measure in part.sets]
        assert shown == wanted, f"{name}: {wanted}"
