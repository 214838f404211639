"""docs/gpu.md: its tables are the GPU day's parts, the compiled kernels' needs and the state of what was measured.

WRITE=1 python -m pytest tests/docs/test_gpu_page.py      rewrites the tables; read the difference before committing
"""

from __future__ import annotations

import importlib
import os
import re

import pytest
from commands import ROOT

from benchmarks.gpu_day.__main__ import PARTS, SECONDS
from benchmarks.gpu_day.journal import DONE, read_rows

PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu-day"
KERNELS = ("fold_kernel", "dlogits_kernel")


def parts() -> list[str]:
    """What each part does, and whether a GPU has run it: parts.csv of the results that are committed."""
    items = read_rows(RESULTS / "parts.csv")
    devices = {row["device"] for row in read_rows(RESULTS / "rates.csv")}
    lines = ["| part | seconds | what | on a GPU |", "|:--|--:|:--|:--|"]
    for part in PARTS:
        done = sum(row["part"] == part.name and row["status"] == DONE for row in items)
        state = f"{done} items on {', '.join(sorted(devices))}" if done else "not measured"
        what = re.split(r"(?<=[a-z0-9])[.:;] ", " ".join((importlib.import_module(part.module).__doc__ or "").split()))[
            0
        ]
        lines.append(f"| `{part.name}` | {part.seconds:.0f} | {what.rstrip('.')} | {state} |")
    return lines


def compiled() -> list[str]:
    lines = ["| kernel | H200: registers | instructions a logit | bits a load | barriers a block | spills |"]
    lines.append("|:--|--:|--:|--:|--:|--:|")
    for row in read_rows(ROOT / "benchmarks" / "results" / "aot.csv"):
        if row["chip"] == "H200" and row["kernel"] in KERNELS and "fp64" not in row["variant"]:
            numbers = ("registers", "instructions_per_logit", "load_bits", "barriers_per_block", "spill_bytes")
            lines.append(f"| {row['kernel']} {row['variant']} | {' | '.join(row[name] for name in numbers)} |")
    return lines


@pytest.mark.parametrize("table", [parts, compiled], ids=lambda table: table.__name__)
def test_a_table_is_what_it_is_made_from(table):
    mark = f"<!-- {table.__name__}: written by tests/docs/test_gpu_page.py -->"
    text, wanted = PAGE.read_text(), "\n".join(table())
    before, rest = text.split(mark)
    found, after = rest.split("\n\n", 2)[1], "\n\n".join(rest.split("\n\n", 2)[2:])
    if os.environ.get("WRITE"):
        PAGE.write_text(f"{before}{mark}\n\n{wanted}\n\n{after}")
    else:
        assert found == wanted


def test_the_page_says_so_as_long_as_nothing_was_measured():
    says_nothing = "Nothing has been measured on a GPU." in PAGE.read_text()
    assert says_nothing is not (RESULTS / "parts.csv").exists()
    assert f"{SECONDS / 60:.0f} minutes" in PAGE.read_text()
