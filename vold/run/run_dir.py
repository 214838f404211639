"""A run directory: config.yaml, metrics.jsonl (one object a step), samples.jsonl, prompts.jsonl (one object for each
prompt that was asked), timeline.jsonl (phases of the last few steps), and a progress line on a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vold.config import dump_config
from vold.config.schema import RunConfig
from vold.run.loggers import Loggers
from vold.run.timers import Phases

# what shows that a run got somewhere
RESULTS = ("metrics.jsonl", "checkpoints", "evaluation.json", "traces", "iteration-0001")
# keys that may differ between a run and its resumption
FREE_KEYS = (
    "parallel",
    "timeout_seconds",
    "save_every",
    "save_async",
    "keep_checkpoints",
    "samples_per_step",
    "image_sensitivity_every",
    "evaluation.best",
    "grader_workers",
    "rollout.vllm",
    "vllm",
    "teacher_vllm",
    "loggers",
)
TIMELINE_STEPS = 8  # a step may hold thousands of intervals, and the last few tell what a run is like


class RunLog:
    """Rank 0 writes; other ranks hold the same object and do nothing."""

    def __init__(self, config: RunConfig, verb: str, *, writer: bool, total: int, peak_flops: float | None = None):
        self.path, self._writer = config.run_dir, writer
        self._config, self._verb, self._peak_flops = config, verb, peak_flops
        self._loggers = Loggers(config, verb)
        self._progress = _progress(writer)
        self._task = self._progress.add_task(verb, total=total, note="", live="")
        self.phase = Phases()
        self._step_started, self._cpu_started = time.perf_counter(), time.process_time()
        self._timeline: deque[dict] = deque(maxlen=TIMELINE_STEPS)

    def open(self, *, resume: bool) -> None:
        """Create the directory, or check that it holds the same run."""
        if self._writer:
            check_run_dir(self._config, self._verb, resume)
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.path / "config.yaml", dump_config(self._config, self._verb))
        self._progress.start()

    def expect(self, total: int) -> None:
        """How many steps there will be, where that is known only once the data are read."""
        self._progress.update(self._task, total=total)

    def advance(self) -> None:
        """One more is done, where there are no steps to write."""
        self._progress.advance(self._task)

    def rewind(self, step: int) -> dict[str, float]:
        """Drop rows after `step`: they belong to updates that were never saved. Returns the metrics of `step`, on the
        writer, where there are any."""
        if not self._writer:
            return {}
        last: dict[str, float] = {}
        for name in ("metrics.jsonl", "samples.jsonl", "prompts.jsonl", "timeline.jsonl"):
            path = self.path / name
            if path.exists():
                rows = [row for row in read_rows(path) if row.get("step", 0) <= step]
                _replace(path, "".join(json.dumps(row) + "\n" for row in rows))
                last = rows[-1] if rows and name == "metrics.jsonl" else last
        self._progress.update(self._task, completed=step)
        return last

    def write(self, step: int, metrics: dict[str, float], samples: Iterable[dict] = ()) -> dict[str, float]:
        """Append one finished step (1-based) and move the progress line. Returns this rank's row: seconds and memory
        are its own."""
        phases = self.phase.read()
        now, cpu = time.perf_counter(), time.process_time()
        seconds, self._step_started = now - self._step_started, now
        row = {"step": step, "seconds": seconds, **metrics, **phases, "peak_memory_gib": self.phase.peak_gib}
        row["cpu_seconds"], self._cpu_started = cpu - self._cpu_started, cpu
        if "response_tokens" in metrics:
            row["tokens_per_second"] = metrics["response_tokens"] / seconds
        if "prompts" in metrics:
            row["prompts_per_second"] = metrics["prompts"] / seconds
        if self._peak_flops and "train_tflop" in metrics:
            row["mfu"] = metrics["train_tflop"] * 1e12 / row["seconds_train"] / self._peak_flops
        if self._writer:
            _append(self.path / "metrics.jsonl", [row])
            _append(self.path / "samples.jsonl", [{"step": step, **sample} for sample in samples])
            self._loggers.log(step, row)
            self._timeline.append({"step": step, "seconds": seconds, "intervals": self.phase.intervals})
            _replace(self.path / "timeline.jsonl", "".join(json.dumps(kept) + "\n" for kept in self._timeline))
            self._progress.update(self._task, completed=step, note=progress_note(row))
        return row

    def metrics(self) -> list[dict]:
        """Rows of metrics.jsonl, on rank 0."""
        path = self.path / "metrics.jsonl"
        return read_rows(path) if self._writer and path.exists() else []

    def asked(self, step: int, prompts: Iterable[dict]) -> None:
        """Append to prompts.jsonl what a step (1-based) asked."""
        if self._writer:
            _append(self.path / "prompts.jsonl", [{"step": step, **prompt} for prompt in prompts])

    def read_prompt_log(self) -> list[dict]:
        """Rows of prompts.jsonl, on rank 0."""
        path = self.path / "prompts.jsonl"
        return read_rows(path) if self._writer and path.exists() else []

    def live(self, note: str) -> None:
        """What is going on inside the step, behind what the last one came to. Any thread may call."""
        self._progress.update(self._task, live=note)

    def close(self) -> None:
        self._progress.stop()
        self._loggers.close()


def check_run_dir(config: RunConfig, verb: str, resume: bool) -> None:
    """Refuse to mix runs. Raises ValueError when the directory holds another run, or none to resume."""
    saved = config.run_dir / "config.yaml"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ValueError(f"run_dir {config.run_dir} is a file; choose another")
    if not saved.is_file():
        if resume:
            raise ValueError(f"--resume: {config.run_dir} holds no run; leave --resume out to start one")
        return
    if not resume and not any((config.run_dir / name).exists() for name in RESULTS):
        return  # an attempt that stopped before its first step
    if not resume:
        raise ValueError(f"run_dir {config.run_dir} holds a run already; --resume continues it, or choose another")
    before, now = _bound_keys(read_config(saved)), _bound_keys(yaml.safe_load(dump_config(config, verb)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"--resume: {key} was {before.get(key)!r} and is now {now.get(key)!r}; resume with the run's own "
                f"{saved}, or start another run_dir"
            )


def _bound_keys(tree: dict, section: str = "") -> dict:
    """section.key -> value, without what may change."""
    found = {}
    for name, value in tree.items():
        if (key := f"{section}{name}") in FREE_KEYS:
            continue
        found |= _bound_keys(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return found


def read_config(saved: Path) -> dict:
    """A run directory's config.yaml, as it is. Raises ValueError for one that holds no config."""
    try:
        found = yaml.safe_load(saved.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{saved} is damaged; write the run's own config back, or start another run_dir")
    return found


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file; a half-written last line (killed run) is left out. Raises ValueError for other damage."""
    rows, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is damaged; mend it or delete the lines from there on") from None
    return rows


def _row(line: bytes) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
        raise ValueError
    return row


def progress_note(row: dict[str, float]) -> str:
    """reward, KL, tokens/s, the rollouts' tail, MFU, memory: those that the step has."""
    shown = [
        ("reward", "{:.3f}"),
        ("nll", "nll {:.4f}"),
        ("kl_teacher", "kl {:.3f}"),
        ("prompts_per_second", "{:.2f} prompts/s"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("rollout_tail_seconds", "tail {:.1f} s"),
        ("mfu", "mfu {:.1%}"),
        ("peak_memory_gib", "{:.2f} GiB"),
    ]
    parts = [("reward " + f if key == "reward" else f).format(row[key]) for key, f in shown if key in row]
    return " · ".join(parts)


def _progress(writer: bool) -> Progress:
    """A live line on a terminal; silent off it and off rank 0."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("{task.fields[live]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not (writer and sys.stderr.isatty()),
    )


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
