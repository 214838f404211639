"""What was begun and finished, and rows of results, on disk after every item: a machine that is taken away loses only
the item in progress, and a second run goes on where the first one stopped. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PLANNED, STARTED, DONE, FAILED, NO_TIME = "planned", "started", "done", "failed", "no time"
COLUMNS = ("part", "item", "status", "seconds", "reason", "time")


def append_rows(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Adds rows to a CSV file, which is on disk when this returns. A line that a killed writer left unfinished is
    cut off first; columns that a row lacks are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read()
        if whole and not whole.endswith(b"\n"):
            whole = whole[: whole.rfind(b"\n") + 1]
            file.truncate(len(whole))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        if not whole:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """All whole rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


@dataclass(frozen=True)
class Journal:
    """parts.csv: each part's items with their states. The last row of an item counts."""

    path: Path

    def note(self, part: str, item: str, status: str, *, seconds: float = 0.0, reason: str = "") -> None:
        row = {"part": part, "item": item, "status": status, "seconds": f"{seconds:.1f}", "reason": reason[:300]}
        append_rows(self.path, [row | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}], COLUMNS)

    def states(self, part: str) -> dict[str, str]:
        """Item -> its last status, in the order in which they were first noted."""
        return {row["item"]: row["status"] for row in read_rows(self.path) if row["part"] == part}

    def unfinished(self, part: str) -> list[str]:
        """Items that wait, had no time, or were in progress when a machine went away."""
        return [item for item, status in self.states(part).items() if status not in (DONE, FAILED)]

    def in_progress(self, part: str) -> list[str]:
        return [item for item, status in self.states(part).items() if status == STARTED]
