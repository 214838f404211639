"""docs/config.md holds every key of the schema, as the code has it.

WRITE=1 python -m pytest tests/config/test_reference.py      writes the page anew; read the difference before committing
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vold.config import reference, schema
from vold.config.schema import Strict

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
SECTIONS = [getattr(schema, name) for name in schema.__all__ if name not in ("Strict", "RunConfig", "TrainConfig")]


def test_the_page_is_up_to_date():
    if os.environ.get("WRITE"):
        PAGE.write_text(reference.markdown(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == reference.markdown()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_a_meaning_and_a_row(section: type[Strict]):
    bases = ("EngineConfig",)  # only inherited from
    page = PAGE.read_text(encoding="utf-8")
    assert section.__name__ in bases or f"\n## {section.__name__}\n" in page
    for name, info in section.model_fields.items():
        assert info.description and info.description.rstrip().endswith("."), name
        assert f"| `{name}` |" in page


def test_types_in_words():
    rows = dict(line.split(" | ", 1) for line in reference.markdown().splitlines() if line.startswith("| `"))
    assert rows["| `pp`"].startswith("integer ≥ 1 | `1`") or rows["| `pp`"].startswith("integer > 0 | `1` |")
    assert rows["| `vpp`"].startswith("integer ≥ 2 or null | `null` |")
    assert rows["| `betas`"].startswith("2 numbers | `[0.9, 0.999]` |")
    assert rows["| `sets`"].startswith("name: [DataConfig](#dataconfig) | `{}` |")
    assert rows["| `urls`"].startswith("list of text | `[]` |")
    assert rows["| `lr`"].startswith("number > 0 |  | Peak")
