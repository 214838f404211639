"""JSONL files that may end in the middle of a line, because the process that wrote them was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vold.untrusted import check_regular

LINE_BYTES = 128 * 2**20
"""Longest line that is read: a row may hold several pictures."""


def parse_row(line: bytes | str) -> dict | None:
    """The JSON object on a line; None for a line that is damaged, unfinished, or holds another kind of value."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def bounded_lines(file: BinaryIO, most_bytes: int = LINE_BYTES) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is longer than `most_bytes`, of which no more is held in memory."""
    while line := file.readline(most_bytes):
        if line.endswith(b"\n") or len(line) < most_bytes:
            yield line
            continue
        yield None  # before the rest of it is read: it may have no end
        while line and not line.endswith(b"\n"):
            line = file.readline(most_bytes)


def read_jsonl(path: Path, is_valid: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Rows of a JSONL file. An unreadable last line is left out.

    Raises ValueError, naming the line, where any other line is unreadable or its row is not valid.
    """
    rows, damaged = [], 0
    check_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file), start=1):
            if damaged:
                raise ValueError(f"{path} line {damaged} is damaged; mend it or delete the lines from there on")
            if line is None:
                raise ValueError(
                    f"{path} line {number} is damaged (over {LINE_BYTES} bytes); delete the lines from there on"
                )
            row = parse_row(line)
            if row is not None and is_valid(row):
                rows.append(row)
            else:
                damaged = number
    return rows
