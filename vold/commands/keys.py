"""`vold keys`: the keys of a config on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from vold.config.reference import COMMANDS, default_text, description, section_of, type_text

OFF_TERMINAL_COLUMNS = 160


def print_keys(word: str) -> None:
    """Print every key whose dotted name, or else whose meaning, has `word` in it; "" prints all.

    Raises ValueError where no key has it.
    """
    rows = _rows()
    named = {key: row for key, row in rows.items() if word.lower() in key.lower()}
    shown = named or {key: row for key, row in rows.items() if word.lower() in row[-1].lower()}
    if not shown:
        sections = sorted({key.split(".")[0] for key in rows if "." in key})
        raise ValueError(f"no key has {word!r} in its name or meaning; sections: {', '.join(sections)}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("key", "type", "default", "of vold", "meaning"):
        table.add_column(heading, overflow="fold", ratio=4 if heading == "meaning" else None)
    for key, (kind, default, commands, meaning) in shown.items():
        table.add_row(key, kind, default, " ".join(commands), meaning)
    console = Console(file=sys.stdout, markup=False, width=None if sys.stdout.isatty() else OFF_TERMINAL_COLUMNS)
    console.print(table)


def _rows() -> dict[str, tuple[str, str, list[str], str]]:
    """Dotted key -> (type, default, commands that have it, meaning)."""
    rows: dict[str, tuple[str, str, list[str], str]] = {}
    for schema in COMMANDS:
        command = schema.__name__.removesuffix("Config").lower()
        for key, row in _keys(schema, ""):
            rows.setdefault(key, (*row[:2], [], row[2]))[2].append(command)
    return rows


def _keys(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for name, info in schema.model_fields.items():
        if section := section_of(info):
            yield from _keys(section, f"{prefix}{name}.")
        else:
            default = default_text(info).strip("`") or "required"
            yield f"{prefix}{name}", (type_text(info), default, description(info))
