"""JSONL files that may end in the middle of a line, because the process that wrote them was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def parse_row(line: bytes | str) -> dict | None:
    """The JSON object on a line; None for a line that is damaged, unfinished, or holds another kind of value."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_jsonl(path: Path, is_valid: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Rows of a JSONL file. An unreadable last line is left out.

    Raises ValueError, naming the line, where any other line is unreadable or its row is not valid.
    """
    rows, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None and is_valid(row):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path} line {number} is damaged; mend it or delete the lines from there on")
    return rows
