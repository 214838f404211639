"""`vold report RUN [RUN ...]`: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vold.report import write_report


def run(runs: Sequence[Path], out: Path) -> None:
    """Writes `out`. Raises ValueError naming a path that is neither a run directory nor a folder of them."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the HTML file to write")
    write_report(runs, out, title=", ".join(path.resolve().name for path in runs))
    print(out)
