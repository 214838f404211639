"""docs/glossary.md names only keys that a config has."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from vold.config import schema

PAGE = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
ROOTS = (schema.RlConfig, schema.SftConfig, schema.EvalConfig, schema.SelfplayConfig)


def section_of(name: str) -> type[BaseModel] | None:
    """The schema of a top-level section, None for a name that is none."""
    for root in ROOTS:
        kind = root.model_fields[name].annotation if name in root.model_fields else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def test_dotted_keys_exist():
    keys = {tuple(key.split(".")) for key in re.findall(r"`([a-z_]+\.[a-z_]+)(?:[.:][^`]*)?`", PAGE)}
    sections = {name: section_of(name) for name, _ in keys}
    of_sections = [(section, key) for section, key in keys if sections[section] is not None]
    assert len(of_sections) > 20
    for section, key in of_sections:
        assert key in sections[section].model_fields, f"{section}.{key}"
