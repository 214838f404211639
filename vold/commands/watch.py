"""`vold watch`: a live run in the terminal, read from the files of its run directory alone."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from vold.report.read import MetricsTail, RunRecord, columns, read_config
from vold.report.watch import is_finished, view

INTERVAL = 1.0  # seconds between two reads


def watch_run(path: Path) -> None:
    """Show the run until it is finished or q or ctrl-c is pressed; once, where the output is not a terminal.

    Raises ValueError when `path` is no run directory.
    """
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run directory (no config.yaml); give the run_dir of a run that was started")
    run, console = LiveRun(path), Console()
    if console.is_terminal:
        try:
            with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
                while not is_finished(run.refresh()) and pressed(INTERVAL) != "q":
                    live.update(view(run.record, silent=run.silent), refresh=True)
        except KeyboardInterrupt:
            pass
    console.print(view(run.refresh(), silent=run.silent))  # the last view stays on the screen


class LiveRun:
    """A run that is still written to. record: its state at the last refresh; silent: seconds since its last step."""

    def __init__(self, path: Path) -> None:
        self._path, self._tail, self._version = path, MetricsTail(path / "metrics.jsonl"), (0.0, 0)
        self.record, self.silent = RunRecord(path.resolve().name, path), 0.0
        self._read()

    def refresh(self) -> RunRecord:
        """Read what has been written since the last call."""
        written = self._tail.poll() or 0.0
        if (version := (written, len(self._tail.rows))) != self._version:
            self._version = version
            self._read()
        self.silent = max(0.0, time.time() - written) if written else 0.0
        return self.record

    def _read(self) -> None:
        config = read_config(self._path / "config.yaml")
        self.record = replace(self.record, config=config, metrics=columns(self._tail.rows))


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits up to so many seconds for a key and returns it, or "". Restores the terminal."""
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
