"""docs/newcomer.md: each row's command prints what it says, or a test watches it.

WRITE=1 python -m pytest tests/docs/test_newcomer.py      rewrites the page; read the difference before committing
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import ROOT
from newcomer import ROWS

from vold import load_config

PAGE = ROOT / "docs" / "newcomer.md"
HEAD = """# What a new user tried

48 mistakes and wishes of a first day, tried on an early version, and what comes of each now. "before" is what it cost
then: silent trained the wrong thing, blocked stopped or lost the work, then lost time, looks, or nothing (fine). Each
row is run by `tests/docs/test_newcomer.py`, or watched by the test that it names.

| # | tried | before | now | watched by |
|--:|:--|:--|:--|:--|
"""


@pytest.fixture(scope="module")
def printed(stand_in) -> dict[str, tuple[int, str, str]]:
    """What was tried -> exit code, standard output, standard error of its command."""
    outcomes = stand_in.outcomes("newcomer")
    return dict(zip((row.tried for row in ROWS if row.command), map(tuple, outcomes), strict=True))


def line(number: int, row) -> str:
    watched = f"`{row.watched}`" if row.watched else "this test"
    return f"| {number} | {row.tried} | {row.before} | {row.now} | {watched} |"


@pytest.mark.parametrize("row", [row for row in ROWS if row.command], ids=lambda row: row.tried)
def test_a_command_prints_what_the_row_says(printed, row):
    code, output, error = printed[row.tried]
    assert code == row.code, output + error
    assert row.said in output + error, output + error
    if code:
        assert len(error.splitlines()) == 1 and "Traceback" not in error


@pytest.mark.parametrize("row", [row for row in ROWS if not row.command], ids=lambda row: row.tried)
def test_a_row_without_a_command_names_a_test_that_there_is(row):
    file, _, name = row.watched.partition("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text() if name else (ROOT / "tests" / file).is_file()


def test_the_page_is_these_rows():
    wanted = HEAD + "".join(line(number, row) + "\n" for number, row in enumerate(ROWS, 1))
    if os.environ.get("WRITE"):
        PAGE.write_text(wanted)
    assert len(ROWS) == 48 and PAGE.read_text() == wanted


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "qwen2.5-vl-3b").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_samples_with_vllm(path: Path):
    config = load_config(path)
    samplers = [getattr(config, name, None) for name in ("rollout", "challenger", "solver")]
    engines = [config.engine] if hasattr(config, "engine") else []
    engines += [getattr(s, "engine", None) or s.rollout.engine for s in samplers if s is not None]
    assert set(engines) <= {"vllm"}
