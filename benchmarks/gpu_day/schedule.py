"""Runs parts one after another in processes of their own, each within its seconds and all before one deadline.

A part that hangs is killed with everything it started; one that crashes is started again for its remaining items; what
had no time is tried again with the seconds that others left. Nothing here raises for a part, and nothing imports torch:
the machine may lack it. State and results are files (`journal.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .journal import DONE, FAILED, NO_TIME, Journal

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 5.0
"""With less than this left no part is started: importing torch takes as long."""
MORE = 75
"""Exit code of a part that has items left for a fresh process."""
LOG_BYTES = 400_000
"""What log.txt keeps of each process's output, from its end."""


@dataclass(frozen=True)
class Part:
    """`module`'s `items` (`part.py`), and the seconds that the first round gives them. fresh: a process for each item.
    interpret: a dry run executes the Triton kernels in Triton's interpreter."""

    name: str
    module: str
    seconds: float
    fresh: bool = False
    interpret: bool = False


@dataclass(frozen=True)
class Run:
    """out: the folder of results. seconds: until the deadline, from `started` (time.monotonic()). reserve: seconds kept
    for what comes after the parts. environment: of the processes. dry_run: tiny sizes, on the CPU."""

    out: Path
    seconds: float
    started: float
    reserve: float = 0.0
    environment: Mapping[str, str] | None = None
    dry_run: bool = False

    @property
    def journal(self) -> Journal:
        return Journal(self.out / "parts.csv")

    def left(self) -> float:
        """Seconds that parts may still take."""
        return self.started + self.seconds - self.reserve - time.monotonic()


def run_parts(parts: Sequence[Part], run: Run) -> None:
    """Two rounds: each part within its own seconds, then what had no time within those that are left."""
    run.out.mkdir(parents=True, exist_ok=True)
    for is_first in (True, False):
        for part in parts:
            if not is_first and not run.journal.unfinished(part.name):
                continue
            limit = min(part.seconds, run.left()) if is_first else run.left()
            if limit < LEAST_SECONDS:
                _note_no_time(part, run)
            else:
                _run_part(part, run, limit)


def _note_no_time(part: Part, run: Run) -> None:
    states = run.journal.states(part.name)
    for item, status in (states or {"": ""}).items():
        if status not in (DONE, FAILED, NO_TIME):
            run.journal.note(part.name, item, NO_TIME, reason="the deadline was near")


def _run_part(part: Part, run: Run, limit: float) -> None:
    """Processes for the part's items until none is left, time is up, or one made no progress."""
    ends = time.monotonic() + limit
    while True:
        before = run.journal.states(part.name)
        code, output = _process(part, run, max(ends - time.monotonic(), LEAST_SECONDS))
        after = run.journal.states(part.name)
        if code not in (0, MORE):
            reason = _reason(code, limit, output)
            for item in run.journal.in_progress(part.name) or ([] if _has_progressed(before, after) else [""]):
                run.journal.note(part.name, item, FAILED, reason=reason)
        has_items = bool(run.journal.unfinished(part.name))
        is_over = code == 0 or not has_items or not _has_progressed(before, run.journal.states(part.name))
        if is_over or ends - time.monotonic() < LEAST_SECONDS:
            return


def _has_progressed(before: dict[str, str], after: dict[str, str]) -> bool:
    ended = (DONE, FAILED)
    return sum(status in ended for status in after.values()) > sum(status in ended for status in before.values())


def _process(part: Part, run: Run, limit: float) -> tuple[int | None, str]:
    """(exit code, or None where it was killed at its limit; the end of its output)."""
    switches = {"--dry-run": run.dry_run, "--fresh": part.fresh, "--interpret": run.dry_run and part.interpret}
    arguments = [
        part.name,
        part.module,
        str(run.out.resolve()),
        f"{limit:.1f}",
        *(x for x, on in switches.items() if on),
    ]
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_day.part", *arguments]
    code = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(run.environment or os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process)
        end = _end_of(output)
    with (run.out / "log.txt").open("a") as log:
        log.write(f"==== {part.name}: exit code {code}\n{end}\n")
    return code, end


def _kill_group(process: subprocess.Popen) -> None:
    """Ends the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(output) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(output.tell() - LOG_BYTES, 0))
    return output.read().decode(errors="replace")


def _reason(code: int | None, limit: float, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if code is None:
        return f"stopped at its limit of {limit:.0f} s"
    return f"the process ended with {f'signal {-code}' if code < 0 else f'code {code}'}{last}"
