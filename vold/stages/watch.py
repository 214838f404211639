"""`vold watch RUN`: a live run in the terminal, read from its files alone; from any machine that sees them."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live

from vold.report.read import MetricsTail, RunRecord, columns, read_config
from vold.report.watch import is_finished, view

INTERVAL = 1.0  # seconds between two looks


def run(path: Path) -> None:
    """Until the run is finished, or q or ctrl-c; once, where the output is not a terminal. Raises ValueError when
    `path` is no run directory."""
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run directory (no config.yaml); give the run_dir of a run that was started")
    tail, console = MetricsTail(path / "metrics.jsonl"), Console()
    record, silent = _look(path, tail)
    if console.is_terminal:
        try:
            with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
                while not is_finished(record) and pressed(INTERVAL) != "q":
                    live.update(view(record, silent=silent), refresh=True)
                    record, silent = _look(path, tail)
        except KeyboardInterrupt:
            pass
    console.print(view(record, silent=silent))  # what was seen last stays on the screen


def _look(path: Path, tail: MetricsTail) -> tuple[RunRecord, float]:
    """The run as it is on file, and the seconds since its last step."""
    written = tail.poll()
    name = path.resolve().name
    record = RunRecord(name, path, read_config(path / "config.yaml"), columns(tail.rows))
    return record, max(0.0, time.time() - written) if written else 0.0


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and gives it, or "". The terminal is as before at the end."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
