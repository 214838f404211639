"""The page's table of roads to a teacher is that of the rows on file, and has all of them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import read_rows
from benchmarks.teacher_roads import COLUMNS, SAMPLED, TOP_K, WHOLE, table

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_rows_on_file():
    rows = read_rows(ROOT / "benchmarks" / "results" / "teacher_roads-cpu.csv")
    roads = {(row["road"], row["gives"]) for row in rows}
    assert roads == {
        *((road, gives) for road in ("trainer", "vLLM in the process", "vold serve") for gives in (SAMPLED, WHOLE)),
        *(("openai", gives) for gives in (SAMPLED, f"top {TOP_K}")),
    }
    assert all(set(row) == set(COLUMNS) for row in rows) and len({row["started"] for row in rows}) == 1, "one run"
    assert "\n".join(table(rows)) in (ROOT / "docs" / "teachers.md").read_text()
