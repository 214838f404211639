"""vold's verbs as separate processes, a few in parallel, with one progress line each.

A phase that has finished before is kept; one that was interrupted resumes from its last checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vold.run.progress import progress_note
from vold.run.resumption import RESULTS
from vold.run.run_dir import read_rows

SECONDS_BETWEEN_LINES = 60.0  # off a terminal
CONFIGS = Path(__file__).with_name("configs")
FINISHED_BY = {
    "traces": "traces/card.json",
    "sft": "model",
    "rl": "model",
    "selfplay": "model",
    "eval": "evaluation.json",
}


@dataclass(frozen=True)
class Phase:
    """One verb on one run directory. `steps`: rows of metrics.jsonl when done (0: it writes none)."""

    verb: str
    config: str
    run_dir: Path
    overrides: tuple[str, ...] = ()
    steps: int = 0

    @property
    def finished(self) -> bool:
        return (self.run_dir / FINISHED_BY[self.verb]).exists()

    def command(self) -> list[str]:
        started = any((self.run_dir / name).exists() for name in RESULTS) and self.verb != "eval"
        return [
            *(sys.executable, "-m", "vold", self.verb, str(CONFIGS / self.config)),
            *self.overrides,
            f"run_dir={self.run_dir}",  # last: a file among the overrides may name its own
            *(["--resume"] if started else []),
        ]


def run_phases(phases: Sequence[Phase], *, parallel: int, keep_going: bool = False) -> dict[str, float]:
    """Run the unfinished phases, `parallel` at a time, in order. Returns seconds per run directory name.

    Raises RuntimeError with the last lines of the log of a phase that failed, and stops the others; with keep_going it
    prints them and runs the others; `finished` tells them apart.
    """
    waiting = [phase for phase in phases if not phase.finished]
    running: dict[subprocess.Popen, tuple[Phase, TaskID, float]] = {}
    seconds: dict[str, float] = {}
    next_lines = time.perf_counter() + SECONDS_BETWEEN_LINES
    with _progress() as progress:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    phase = waiting.pop(0)
                    task = progress.add_task(phase.run_dir.name, total=phase.steps or None, note="")
                    running[_start(phase)] = (phase, task, time.perf_counter())
                for process, (phase, task, started) in list(running.items()):
                    _show(progress, task, phase)
                    if process.poll() is not None:
                        del running[process]
                        seconds[phase.run_dir.name] = time.perf_counter() - started
                        try:
                            _finish(process, phase, progress, task, seconds[phase.run_dir.name])
                        except RuntimeError as error:
                            if not keep_going:
                                raise
                            progress.console.print(str(error), markup=False)
                if progress.disable and time.perf_counter() > next_lines:
                    next_lines += SECONDS_BETWEEN_LINES
                    _print_lines(progress)
                time.sleep(0.2)
        finally:
            for process in running:
                process.kill()
    return seconds


def _start(phase: Phase) -> subprocess.Popen:
    phase.run_dir.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with _log(phase).open("ab") as log:
        return subprocess.Popen(phase.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)


def _log(phase: Phase) -> Path:
    return phase.run_dir.with_suffix(".log")


def _finish(process: subprocess.Popen, phase: Phase, progress: Progress, task: TaskID, seconds: float) -> None:
    if process.returncode != 0 or not phase.finished:
        lines = _log(phase).read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError("\n".join([f"{phase.run_dir.name} failed ({_log(phase)}):", *lines]))
    progress.update(task, completed=phase.steps or 1, total=phase.steps or 1)
    progress.console.print(f"  {phase.run_dir.name:<28} {seconds:6.0f} s")


def _show(progress: Progress, task: TaskID, phase: Phase) -> None:
    metrics = phase.run_dir / "metrics.jsonl"
    if phase.steps and metrics.exists() and (rows := read_rows(metrics)):
        progress.update(task, completed=len(rows), note=progress_note(rows[-1]))


def _print_lines(progress: Progress) -> None:
    for task in progress.tasks:
        if task.total and 0 < task.completed < task.total:
            steps = f"{task.completed:.0f}/{task.total:.0f}"
            progress.console.print(f"  {task.description:<28} {steps:>8}  {task.fields['note']}", markup=False)


def _progress() -> Progress:
    """A live line per running phase on a terminal; elsewhere `run_phases` prints lines, fewer of them."""
    console = Console(file=sys.stdout)
    return Progress(
        TextColumn("  {task.description:<28}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
