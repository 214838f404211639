"""`vold report`: one self-contained HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vold.io import log, visible
from vold.report import write_report


def write_report_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page to `out`. Raises ValueError naming a path that is neither a run directory nor a folder of them."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the HTML file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # below a file, or where no folder can be made
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); choose another path") from None
    write_report(runs, out, title=", ".join(path.resolve().name for path in runs))
    log.info(visible(str(out)))
