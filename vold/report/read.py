"""Run directories as frozen records. Tolerant: a run may be unfinished, half-written, or lack any of its files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vold.jsonl import bounded_lines, parse_row
from vold.untrusted import JSON_BYTES, check_regular, check_size, read_yaml

T, K = TypeVar("T"), TypeVar("K")

EVALUATION_BYTES = 64 * 2**20  # read of an evaluation's samples.jsonl, from its end
TRAINING_BYTES, TRAINING_PARTS = 16 * 2**20, 8  # read of a training run's, in parts spread over the run
TAIL_BYTES = 256 * 2**20  # of a metrics.jsonl read at once
_RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json")
OLD_METRICS = {
    "clip_low": "clip_fraction_low",
    "clip_high": "clip_fraction_high",
    "teacher_blind": "teacher_skipped_images",
    "visual_reliance": "image_sensitivity",
    "seconds_reliance": "seconds_image_sensitivity",
}
"""Keys that older runs logged -> their present names."""


@dataclass(frozen=True)
class RunRecord:
    """The content of one run directory.

    metrics    key -> one float per step, NaN where a step did not log the key; always has "step" if not empty
    timeline   the last steps, oldest first: {"step", "intervals": [[phase, thread, start s, end s], …]}
    card       the data card of a finished stage 0: how many traces were asked for, kept and dropped
    skipped    unreadable lines, usually the last one of a run that was stopped
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    timeline: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] | None = None
    card: Mapping[str, Any] | None = None
    skipped: int = 0

    @property
    def verb(self) -> str:
        """traces, sft, rl, eval, …; guessed from the files when the config does not name it."""
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
        """The first `steps` or `max_steps` anywhere in the config; of self-play its iterations."""
        if self.verb == "selfplay":
            return self.config.get("iterations") if isinstance(self.config.get("iterations"), int) else None
        names = ("steps", "max_steps", "total_steps")
        flat = flatten(self.config).items()
        return next((n for key, n in flat if key.split(".")[-1] in names and isinstance(n, int)), None)

    @property
    def best(self) -> tuple[str, float] | None:
        """(accuracy key, step) of the checkpoint kept by evaluation.best, the first of equals; None without one."""
        name = flatten(self.config).get("evaluation.best")
        key = f"accuracy_{name}"
        scores = [(value, -step) for step, value in self.finite(key)]
        return (key, -max(scores)[1]) if name and scores else None

    def finite(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of the finite values of a metric."""
        values = self.metrics.get(key, [])
        pairs = zip(self.steps or range(len(values)), values, strict=False)
        return [(step, value) for step, value in pairs if math.isfinite(value)]

    def evaluation_section(self, name: str) -> dict[str, Mapping[str, Any]]:
        """A table of evaluation.json ("sets", or VLMEvalKit's "benchmarks"), the entries that are well formed."""
        return mappings_in((self.evaluation or {}).get(name))


def mappings_in(value: Any) -> dict[str, Mapping[str, Any]]:
    """Return the entries of a mapping that are mappings themselves; {} for anything else."""
    return {k: v for k, v in value.items() if isinstance(v, Mapping)} if isinstance(value, Mapping) else {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {"a.b.c": leaf}; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Collect the items of equal key, keys and items in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def find_runs(path: Path) -> list[Path]:
    """Return the run directories at `path`: itself, or those inside a folder of runs such as runs/demo, oldest first.

    Raises ValueError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"runs: {path} is not a directory; give a run directory or a folder of them")
    if _is_run(path):
        return [path]
    inside = [child for child in path.iterdir() if child.is_dir() and _is_run(child)]
    if not inside:
        raise ValueError(f"runs: {path} holds no run (none of {', '.join(_RUN_FILES)} in it or one level below)")
    return sorted(inside, key=lambda child: (_started(child), child.name))


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read one run directory. Absent or damaged files leave their field empty."""
    path = Path(path)
    metric_rows, bad_metrics = read_jsonl(path / "metrics.jsonl", TAIL_BYTES)
    evaluation = read_json(path / "evaluation.json")
    limit = (EVALUATION_BYTES, 1) if evaluation else (TRAINING_BYTES, TRAINING_PARTS)
    samples, bad_samples = read_jsonl(path / "samples.jsonl", *limit)
    timeline, _ = read_jsonl(path / "timeline.jsonl", TAIL_BYTES)
    return RunRecord(
        name=name or path.name,
        path=path,
        config=read_config(path / "config.yaml"),
        metrics=columns(metric_rows),
        samples=tuple(samples),
        timeline=tuple(timeline),
        evaluation=evaluation,
        card=read_json(path / "traces" / "card.json"),
        skipped=bad_metrics + bad_samples,
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read every run at or below `paths` once; runs of equal names get their folder's before it."""
    runs = list(dict.fromkeys(run.resolve() for path in paths for run in find_runs(path)))
    names = [run.name for run in runs]
    return [read_run(run, run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}") for run in runs]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rows of metrics.jsonl as one column per metric, by step, under the present names (OLD_METRICS).

    A step logged twice (a resumed run repeats some) keeps its newest row.
    """
    by_step: dict[float, Mapping[str, Any]] = {}
    for index, row in enumerate(rows):
        step = as_number(row.get("step", index))
        by_step[step if math.isfinite(step) else float(index)] = {OLD_METRICS.get(key, key): row[key] for key in row}
    steps = sorted(by_step)
    keys = dict.fromkeys(key for row in by_step.values() for key in row if key != "step")
    table = {key: [as_number(by_step[step].get(key)) for step in steps] for key in keys}
    return {"step": steps} | table if steps else {}


def as_number(value: Any) -> float:
    """A float; NaN for anything that is not a number, or so large that its square overflows."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 1e100 else math.nan


def is_correct(row: Mapping[str, Any]) -> bool:
    """Return whether a row of samples.jsonl was graded correct, by its verdict or, without one, its reward."""
    verdict = row.get("verdict")
    if isinstance(verdict, Mapping):
        verdict = verdict.get("outcome")
    if isinstance(verdict, str | bool):
        return verdict in ("correct", True)
    reward = row.get("reward")
    return isinstance(reward, int | float) and reward > 0.5


def problem_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """(set, problem) that a row of samples.jsonl answers."""
    return str(row.get("set", "")), str(row.get("prompt_id"))


def parse_rows(lines: Iterable[bytes | None]) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects among the lines and the number of other lines, blank ones left out."""
    texts = ("{" if line is None else line.decode("utf-8", errors="replace").strip() for line in lines)
    rows = [parse_row(text) for text in texts if text]
    return [row for row in rows if row is not None], rows.count(None)


def read_jsonl(path: Path, most_bytes: int | None = None, parts: int = 1) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSONL file and the number of unreadable lines; ([], 0) without a file.

    A file longer than `most_bytes` is read in `parts` spread evenly over it, the last one at its end.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            return parse_rows(_lines(file, path.stat().st_size, most_bytes, parts))
    except (OSError, ValueError):
        return [], 0


class MetricsTail:
    """Follows the metrics.jsonl of a live run.

    rows   the complete lines so far; a line that is still being written comes later. A file that was replaced, as
           --resume does when it drops rows, or truncated, is read again from its start.
    """

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = 0

    def poll(self) -> float | None:
        """Read the new lines; return the time of the file's last change, None without a file."""
        try:
            check_regular(self._path)
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self.rows, self._offset = [], 0
                    self._file = status.st_dev, status.st_ino
                file.seek(self._offset)
                complete, newline, _ = file.read(TAIL_BYTES).rpartition(b"\n")
        except (OSError, ValueError):
            return None
        self._offset += len(complete) + len(newline)
        self.rows += parse_rows(complete.splitlines())[0]
        return status.st_mtime


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None."""
    try:
        check_size(path, JSON_BYTES)
        return parse_row(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; {} without one."""
    try:
        value = read_yaml(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(file: Any, size: int, most_bytes: int | None, parts: int) -> Iterable[bytes | None]:
    if most_bytes is None or size <= most_bytes:
        yield from bounded_lines(file)
        return
    length = most_bytes // parts
    for part in range(1, parts + 1):
        start = (size - length) * part // parts
        file.seek(max(start - 1, 0))
        file.readline(length)  # the end of a line that began before
        while file.tell() < start + length and (line := file.readline(length)):
            yield line


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _RUN_FILES)


def _started(path: Path) -> float:
    """Time at which the run began, so that a pipeline's runs come in the order in which they ran."""
    config = path / "config.yaml"
    return config.stat().st_mtime if config.is_file() else path.stat().st_mtime
