"""docs/bad-input.md holds exactly what the command line prints for each mistake: one line, and the exit code.

WRITE=1 python -m pytest tests/docs/test_bad_input.py      rewrites the page; read the difference before committing
"""

from __future__ import annotations

import os
from importlib.metadata import distributions

import pytest
from bad_input import SECTIONS
from commands import ROOT

pytestmark = pytest.mark.skipif(any(distributions(name="vllm")), reason="the page is of an environment without vLLM")
PAGE = ROOT / "docs" / "bad-input.md"
HEAD = """# Bad input: what a mistake prints

Exit code 2 and one line on standard error, before a model is trained. What the codes mean:
[troubleshooting.md](troubleshooting.md#exit-codes). This page is written by `tests/docs/test_bad_input.py`, which runs
every row and fails where a word differs; `data.on_error=skip` turns the rows about data and images into a note each.
"""
CASES = [(section, case.mistake) for section, cases in SECTIONS.items() for case in cases]


@pytest.fixture(scope="session")
def printed(stand_in) -> dict[tuple[str, str], tuple[int, str]]:
    """(section, mistake) -> exit code, standard error."""
    outcomes = stand_in.outcomes("bad_input")
    return {name: tuple(outcome) for name, outcome in zip(CASES, outcomes, strict=True)}


@pytest.fixture(scope="session")
def table(printed) -> dict[tuple[str, str], str]:
    """(section, mistake) -> its row on the page."""
    rows = {name: row(name[1], *outcome) for name, outcome in printed.items()}
    if os.environ.get("WRITE"):
        text = HEAD
        for section in SECTIONS:
            text += f"\n## {section}\n\n| mistake | what is printed | exit code |\n|:--|:--|--:|\n"
            text += "".join(rows[name] + "\n" for name in CASES if name[0] == section)
        PAGE.write_text(text)
    return rows


def row(mistake: str, code: int, error: str) -> str:
    line = error.replace("|", "\\|")
    quote = "``" if "`" in line else "`"
    space = " " if "`" in line else ""
    return f"| {mistake} | {quote}{space}{line}{space}{quote} | {code} |"


@pytest.mark.parametrize("name", CASES, ids=": ".join)
def test_a_mistake_is_one_line_and_exit_code_2(printed, name):
    code, error = printed[name]
    assert "Traceback" not in error, error
    assert len(error.splitlines()) == 1 and error.startswith("vold: "), error
    assert code == 2


@pytest.mark.parametrize("name", CASES, ids=": ".join)
def test_the_page_shows_what_is_printed(table, name):
    section = PAGE.read_text().partition(f"\n## {name[0]}\n")[2].partition("\n## ")[0]
    assert table[name] in section.splitlines()


def test_the_page_holds_nothing_else(table):
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(CASES) + len(SECTIONS)
