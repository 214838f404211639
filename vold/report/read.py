"""Run directories -> frozen records. Tolerant: a run may be unfinished, half-written, or miss any of its files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EVALUATION_BYTES = 64 * 2**20  # of a longer samples.jsonl only the end is read
TRAINING_BYTES, TRAINING_PARTS = 16 * 2**20, 8  # of a training run's, as much in parts from all along the run
_RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json")


@dataclass(frozen=True)
class RunRecord:
    """What one run directory says.

    metrics    key -> one float per step, NaN where a step did not log the key; always has "step" if not empty
    timeline   the last steps, oldest first: {"step", "intervals": [[phase, lane, start s, end s], …]}
    skipped    lines that could not be read, usually the last one of a run that was stopped
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    timeline: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] | None = None
    skipped: int = 0

    @property
    def verb(self) -> str:
        """traces, sft, rl, eval; guessed from what is there when the config does not say."""
        if isinstance(verb := self.config.get("verb"), str):
            return verb
        if self.evaluation:
            return "eval"
        return "rl" if "reward" in self.metrics else "sft" if "loss" in self.metrics else "unknown"

    @property
    def steps(self) -> list[float]:
        return self.metrics.get("step", [])

    @property
    def planned_steps(self) -> int | None:
        """The first `steps` or `max_steps` anywhere in the config."""
        for key, value in flatten(self.config).items():
            if key.split(".")[-1] in ("steps", "max_steps", "total_steps") and isinstance(value, int):
                return value
        return None

    @property
    def best(self) -> tuple[str, float] | None:
        """(accuracy key, step) of the checkpoint that evaluation.best keeps, the first of equals; None where the run
        keeps none, or has not evaluated yet."""
        kept = flatten(self.config).get("evaluation.best")
        key = f"accuracy_{kept}"
        values = self.metrics.get(key, ())
        scored = [(value, -self.steps[place]) for place, value in enumerate(values) if math.isfinite(value)]
        return (key, -max(scored)[1]) if kept and scored else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"a.b.c": leaf}; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def find_runs(path: Path) -> list[Path]:
    """The run directories at `path`: itself, or, for a folder of runs such as runs/demo, those inside it."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"runs: {path} is not a directory; give a run directory or a folder of them")
    if _is_run(path):
        return [path]
    inside = [child for child in path.iterdir() if child.is_dir() and _is_run(child)]
    if not inside:
        raise ValueError(f"runs: {path} holds no run (none of {', '.join(_RUN_FILES)} in it or one level below)")
    return sorted(inside, key=lambda child: (_first_written(child), child.name))


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """One run directory -> RunRecord. Absent or damaged files leave their field empty."""
    path = Path(path)
    metric_rows, bad_metrics = read_jsonl(path / "metrics.jsonl")
    evaluation = read_json(path / "evaluation.json")
    some = (EVALUATION_BYTES, 1) if evaluation else (TRAINING_BYTES, TRAINING_PARTS)
    samples, bad_samples = read_jsonl(path / "samples.jsonl", *some)
    timeline, _ = read_jsonl(path / "timeline.jsonl")
    return RunRecord(
        name=name or path.name,
        path=path,
        config=read_config(path / "config.yaml"),
        metrics=columns(metric_rows),
        samples=tuple(samples),
        timeline=tuple(timeline),
        evaluation=evaluation,
        skipped=bad_metrics + bad_samples,
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Every run at or below `paths`, once, under names that differ."""
    found = [run for path in paths for run in find_runs(path)]
    unique = list({run.resolve(): run for run in found}.values())
    names = [run.resolve().name for run in unique]
    labels = [
        name if names.count(name) == 1 else f"{run.resolve().parent.name}/{name}"
        for run, name in zip(unique, names, strict=True)
    ]
    return [read_run(run, label) for run, label in zip(unique, labels, strict=True)]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rows -> columns by step. A step logged twice (a resumed run repeats some) keeps its newest row."""
    by_step: dict[float, Mapping[str, Any]] = {}
    for index, row in enumerate(rows):
        step = as_number(row.get("step", index))
        by_step[step if math.isfinite(step) else index] = row
    steps = sorted(by_step)
    if not steps:
        return {}
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    table = {"step": [float(step) for step in steps]}
    for key in keys:
        values = [as_number(by_step[step].get(key)) for step in steps]
        if any(key in by_step[step] for step in steps):
            table[key] = values
    return table


def as_number(value: Any) -> float:
    """A float; NaN for anything that is not a number, or so large that its square is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 1e100 else math.nan


def read_jsonl(path: Path, most_bytes: int | None = None, parts: int = 1) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file and how many lines were not objects. No file: ([], 0). Of one longer than
    `most_bytes` only so many bytes, in `parts` spread evenly, the last at its end."""
    rows: list[dict[str, Any]] = []
    bad = 0
    for line in _lines(path, most_bytes, parts):
        if isinstance(row := _parsed(line), dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


class MetricsTail:
    """A live run's metrics.jsonl. `rows`: those that are whole so far; a line that is still being written comes later.
    A file that was replaced, as --resume does when it drops rows, or cut, is read anew."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = 0

    def poll(self) -> float | None:
        """Read what has come since; the time of the file's last change, None while there is no file."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self.rows, self._offset = [], 0
                    self._file = status.st_dev, status.st_ino
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")
        except OSError:
            return None
        self._offset += len(whole[0]) + len(whole[1])
        self.rows += [row for line in whole[0].splitlines() if isinstance(row := _parsed(line), dict)]
        return status.st_mtime


def _parsed(line: str | bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lines(path: Path, most_bytes: int | None, parts: int) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for start, end in _stretches(path.stat().st_size, most_bytes, parts):
                file.seek(max(start - 1, 0))
                if start:
                    file.readline()  # the rest of a line that began before
                while file.tell() < end and (raw := file.readline()):
                    if line := raw.decode("utf-8", errors="replace").strip():
                        yield line
    except OSError:
        return


def _stretches(size: int, most_bytes: int | None, parts: int) -> list[tuple[int, int]]:
    if most_bytes is None or size <= most_bytes:
        return [(0, size)]
    each = most_bytes // parts
    starts = [(size - each) * (part + 1) // parts for part in range(parts)]
    return [(start, start + each) for start in starts]


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} where there is none."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2026-99-99
        return {}
    return value if isinstance(value, dict) else {}


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _RUN_FILES)


def _first_written(path: Path) -> float:
    """When the run began, so that a pipeline's runs come in the order in which they ran."""
    config = path / "config.yaml"
    return config.stat().st_mtime if config.is_file() else path.stat().st_mtime
