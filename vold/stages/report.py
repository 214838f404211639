"""`vold report RUN [RUN ...]`: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vold.report import write_report


def run(runs: Sequence[Path], out: Path) -> None:
    """Writes `out`. Raises ValueError naming a path that is no run directory."""
    for path in runs:
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is no run directory (no config.yaml)")
    write_report(runs, out, title=", ".join(path.name for path in runs))
    print(out)
