"""The run directory and the progress line.

config.yaml      the validated config
lock.json        the process that writes here now (vold.run.lock)
metrics.jsonl    one object a step
samples.jsonl    a few responses of each step
prompts.jsonl    one object for each prompt that a step sampled, with its pass rate and rewards
inputs.jsonl     size and SHA-256 of the models' and data files that the run was begun with (vold.train.input_files)
reward.json      SHA-256 of the files of reward functions of one's own
reward.log       what they print, and why a response has no reward
judge/           requests to a judge, and its answers
timeline.jsonl   the phases of the last few steps
log.txt          what the run said, with times, and the seconds of each phase
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import yaml

from vold.config import dump_config
from vold.config.schema import RunConfig
from vold.file_errors import file_error_line
from vold.io import append_jsonl, flush_to_disk, log, logged_to, to_json, write_atomically
from vold.jsonl import read_jsonl
from vold.run.leftovers import remove, unfinished
from vold.run.lock import RunLock
from vold.run.log_digests import LogDigests, in_words, is_as_described
from vold.run.loggers import Loggers
from vold.run.progress import accuracy_line, progress_line, progress_note, step_line
from vold.run.resumption import check_run_dir, restated
from vold.run.timers import PhaseTimers

TEXT_LOG = "log.txt"
SECONDS_BETWEEN_LINES = 30.0  # off a terminal, where there are no steps
LOGS = ("metrics.jsonl", "samples.jsonl", "prompts.jsonl", "timeline.jsonl")
CHECKED_LOGS = LOGS[:3]  # timeline.jsonl is written anew at each step
TIMELINE_STEPS = 8  # a step may hold thousands of intervals, and the last few steps represent the run


class RunLog:
    """Writes the run directory and the progress line on rank 0. Other ranks hold the same object, which writes nothing.

    phase        timers of the step in progress: `with log.phase("train"):`
    peak_flops   FLOP/s of all ranks together, which `mfu` refers to; unknown where None or 0
    """

    def __init__(self, config: RunConfig, verb: str, *, writer: bool, total: int, peak_flops: float | None = None):
        self.path, self._writer = config.run_dir, writer
        self._config, self._verb, self._peak_flops = config, verb, peak_flops
        settings = yaml.safe_load(dump_config(config, verb))
        self._loggers = Loggers(config.loggers, config.tracking, config.run_dir, settings)
        self._progress = progress_line(writer)
        self._task = self._progress.add_task(verb, total=total, note="", status="")
        self.phase = PhaseTimers()
        self._step_started, self._cpu_started = time.perf_counter(), time.process_time()
        self._timeline: deque[dict] = deque(maxlen=TIMELINE_STEPS)
        self._lock: RunLock | None = None
        self._digests = LogDigests()
        self._text_log = ExitStack()
        self._steps_since: tuple[int, float] | None = None
        self._next_line = time.perf_counter() + SECONDS_BETWEEN_LINES

    def open(self, *, resume: bool) -> None:
        """Create the directory, or check that it holds the same run, and lock it. Raises ValueError where it cannot be
        written, or where another process writes it."""
        if self._writer:
            check_run_dir(self._config, self._verb, resume)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(self.path, self._verb)
                remove(unfinished(self.path))
                check_run_dir(self._config, self._verb, resume)  # of two that started together, the second
                changes = restated(self._config, self._verb) if resume else []
                write_atomically(self.path / "config.yaml", dump_config(self._config, self._verb))
                self._text_log.enter_context(logged_to(self.path / TEXT_LOG))
            except OSError as error:
                reason = file_error_line(error) or f"{error.strerror}; choose another path"
                raise ValueError(f"run_dir = {self.path} cannot be written: {reason}") from None
            for change in changes:
                self.say(f"--resume: {change}", logging.WARNING)
        self._progress.start()

    def set_total(self, total: int) -> None:
        """Set the progress bar's total, where it is known only once the data are read."""
        self._progress.update(self._task, total=total)

    def advance(self) -> None:
        """Move the progress bar by one, where there are no steps to log; off a terminal a line now and then."""
        self._progress.advance(self._task)
        if self._progress.disable and time.perf_counter() > self._next_line:
            task = self._progress.tasks[self._task]
            self.say(f"{self._verb} {task.completed:.0f}" + (f"/{task.total:.0f}" if task.total else ""))
            self._next_line = time.perf_counter() + SECONDS_BETWEEN_LINES

    def say(self, line: str, level: int = logging.INFO) -> None:
        """A line on the console and in log.txt, on rank 0."""
        if self._writer:
            log.log(level, line)

    def show_status(self, status: str) -> None:
        """Show what happens inside the step, behind the last step's numbers. Any thread may call."""
        self._progress.update(self._task, status=status)

    def drop_rows_after(self, step: int) -> dict[str, float]:
        """Drop rows after `step`: they belong to updates that were never saved.

        Returns the metrics of the last row kept, on rank 0; empty where there is none.
        """
        if not self._writer:
            return {}
        last_metrics: dict[str, float] = {}
        self._digests = LogDigests()
        for name in LOGS:
            path = self.path / name
            if path.exists():
                lines = zip(read_rows(path), path.read_bytes().splitlines(), strict=False)  # a torn last one is no row
                kept = [(row, line) for row, line in lines if row.get("step", 0) <= step]
                write_atomically(path, b"".join(line + b"\n" for _, line in kept), durable=True)
                rows = [row for row, _ in kept]
                last_metrics = _numbers(rows[-1]) if rows and name == "metrics.jsonl" else last_metrics
                if name == "timeline.jsonl":
                    self._timeline.extend(rows)
        self._progress.update(self._task, completed=step)
        return last_metrics

    def flush(self) -> dict[str, dict]:
        """Put every row on disk, before a checkpoint that follows them. Returns, on rank 0, the size and SHA-256 of the
        logs whose rows a report draws, for `check_rows`."""
        if not self._writer:
            return {}
        found = {}
        for name in LOGS:
            if (path := self.path / name).exists():
                flush_to_disk(path)
                if name in CHECKED_LOGS:
                    found[name] = self._digests.of(path)
        flush_to_disk(self.path)
        return found

    def check_rows(self, step: int, logs: dict[str, dict] | None) -> None:
        """Warn, on rank 0, about rows up to `step` that were lost or changed since its checkpoint, which `flush` then
        described as `logs`: the run continues without them, and its curves do not."""
        if not self._writer or not step:
            return
        for name, then in (logs or {}).items():
            path = self.path / name
            if not is_as_described(path, then):
                rows = {row.get("step", 0) for row in read_rows(path)} if path.exists() else set()
                missing = [number for number in range(1, step + 1) if number not in rows]
                what = f"{in_words(missing)} missing" if missing else "rows were changed"
                log.warning(
                    f"{path}: {what} since the checkpoint of step {step} was written; training is not affected, it "
                    "continues from the checkpoint alone, but curves and reports are"
                )

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Iterable[dict] = ()) -> dict[str, float]:
        """Append one finished step (1-based) and move the progress line.

        Returns this rank's row; its seconds and memory are this rank's own.
        """
        phases = self.phase.finish_step()
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
            self.check_lock()
            append_jsonl(self.path / "metrics.jsonl", [row])
            append_jsonl(self.path / "samples.jsonl", [{"step": step, **sample} for sample in samples])
            self._loggers.log(step, row)
            self._timeline.append({"step": step, "seconds": seconds, "intervals": self.phase.intervals})
            write_atomically(self.path / "timeline.jsonl", "".join(to_json(row) + "\n" for row in self._timeline))
            self._progress.update(self._task, completed=step, note=progress_note(row))
            self._say_step(step, row)
        return row

    def _say_step(self, step: int, row: dict[str, float]) -> None:
        """A line a step: off a terminal on the console, where the live line is not; everywhere in log.txt."""
        now = time.perf_counter()
        first, began = self._steps_since = self._steps_since or (step - 1, now - row["seconds"])
        total = int(self._progress.tasks[self._task].total or step)
        left = (now - began) / (step - first) * (total - step)
        self.say(
            step_line(self._verb, step, total, row, left), logging.INFO if self._progress.disable else logging.DEBUG
        )
        if accuracies := accuracy_line(row):
            self.say(f"evaluation after step {step}: {accuracies}")
        seconds = [f"{name.removeprefix('seconds_')} {row[name]:.2f}" for name in row if name.startswith("seconds_")]
        self.say(f"seconds of step {step}: {', '.join(seconds)}", logging.DEBUG)

    def log_prompts(self, step: int, prompts: Iterable[dict]) -> None:
        """Append the prompts that a step (1-based) sampled to prompts.jsonl."""
        if self._writer:
            self.check_lock()
            append_jsonl(self.path / "prompts.jsonl", [{"step": step, **prompt} for prompt in prompts])

    def read_metrics(self) -> list[dict]:
        """Rows of metrics.jsonl, on rank 0."""
        return [_numbers(row) for row in self._read("metrics.jsonl")]

    def read_prompt_log(self) -> list[dict]:
        """Rows of prompts.jsonl, on rank 0."""
        return self._read("prompts.jsonl")

    def _read(self, name: str) -> list[dict]:
        path = self.path / name
        return read_rows(path) if self._writer and path.exists() else []

    def check_lock(self) -> None:
        """Raise ValueError where another process has taken the run directory over, on rank 0."""
        if self._lock:
            self._lock.check()

    def hide(self) -> None:
        """Stop the progress line, where others show theirs."""
        self._progress.stop()

    def close(self) -> None:
        """Stop the progress line and the loggers, and give the run directory free."""
        self._progress.stop()
        self._loggers.close()
        self._text_log.close()
        if self._lock:
            self._lock.release()


def read_rows(path: Path) -> list[dict]:
    """Rows of a run's JSONL file; a half-written last line (killed run) is left out. Raises ValueError for other
    damage."""
    return read_jsonl(path, lambda row: isinstance(row.get("step", 0), int))


def _numbers(row: dict) -> dict:
    """A row of metrics; NaN where the file holds null, see to_json."""
    return {key: math.nan if value is None else value for key, value in row.items()}
