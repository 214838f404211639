"""Every row of the table in docs/your-own-data.md is read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import members
import pytest
import yaml
from PIL import Image

from vold.config.schema import DataConfig
from vold.data.cells import Cells
from vold.data.layouts import PROBLEM_LAYOUTS, TRACE_LAYOUTS
from vold.data.problems import column_use, load_problems, load_text_traces

PAGE = Path(__file__).parents[2] / "docs" / "your-own-data.md"
ROWS = {
    cells[0]: (json.loads(cells[1].strip("`")), yaml.safe_load(cells[2].strip("`")))
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("| ").split(" | ")]) == 3
    if cells[1].startswith(("`{", "`["))
}
SFT = ("TRL, SFT", "ms-swift, SFT", "ms-swift, query", "ms-swift, earlier", "ShareGPT", "Alpaca", "Dolly", "OpenAI")


def test_the_table_is_read_whole():
    names = " ".join(ROWS)
    for source in ["TRL", "verl", "ms-swift", "ShareGPT", "Alpaca", "OpenAI", "GSM8K", "MMMU", "Geometry3K"]:
        assert source in names
    assert len(ROWS) >= 20


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_as_the_table_says(tmp_path, name):
    row, settings = ROWS[name]
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(path=tmp_path / "set.jsonl", **settings)
    if name.startswith(SFT):
        traces = load_text_traces(config)
        problem, response = traces[-1].problem, traces[-1].response
        assert response == "2" and len(traces) == (2 if settings.get("targets") == "all" else 1)
        if "targets" in settings:
            assert problem.history == (("user", "1+0?"), ("assistant", "1")) and traces[0].response == "1"
    else:
        (problem,) = load_problems(config, needs_gold=name != "prompts alone")
        assert problem.gold == ("" if name == "prompts alone" else "B" if problem.choices else "2")
        assert problem.choices[1:] in ((), ("two",))
    text = problem.question.replace("<image>", "").strip()
    assert text.startswith(("1+1?", "How many?", "Which is", "Add.\n\n1+1"))
    assert problem.question.count("<image>") == len(problem.images) == ("a.png" in json.dumps(row))
    assert (("system", "Be brief.") in problem.history) == ("Be brief." in json.dumps(row))
    unread = column_use(config).unread
    assert set(unread) <= {"reward_model.style"}, "what the table's settings do not read is said"


@pytest.mark.parametrize("name", ROWS)
def test_the_error_of_another_layout_names_what_to_write(tmp_path, name):
    """With the wrong layout the line lists the columns that are there and a layout that reads them."""
    row, _ = ROWS[name]
    cells = Cells(row, {})
    fitting = cells.fitting()
    if not fitting:
        pytest.skip("its columns fit no known layout")
    settings = yaml.safe_load(
        "{" + fitting.replace("data.", "").replace("=", ": ").replace(" columns", ", columns") + "}"
    )
    read = {**PROBLEM_LAYOUTS, **TRACE_LAYOUTS}[settings["layout"]](Cells(row, settings.get("columns", {})))
    assert (read.question or read.messages) is not None


@pytest.mark.parametrize("kind", members.KINDS)
def test_the_table_of_members_names_tests_that_are_there(kind):
    for file, names in members.KINDS[kind]:
        found = re.findall(r"^def (test_\w+)", (members.TESTS / file).read_text(), re.M)
        assert all(any(test.startswith(name) for test in found) for name in names), (file, names)
    assert f"| {kind} |" in members.PAGE.read_text()
