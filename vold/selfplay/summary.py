"""The log of self-play: one row of metrics an iteration, and the figure at the end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from vold.run.job import Job
from vold.run.run_dir import read_rows
from vold.selfplay.bank import Bank
from vold.selfplay.diversity import project_to_plane
from vold.selfplay.figures import SelfplayRecord, diversity_figure
from vold.selfplay.iteration import Iteration
from vold.untrusted import read_json

CHALLENGER_METRICS = ("reward", "well_formed", "uncertainty", "repetition", "memory_penalty")


def log_iteration(job: Job, number: int, measure: Callable[[], tuple[dict[str, float], list[dict]]]) -> None:
    """Append the row of an iteration, unless it is logged already. `measure` returns metrics and sample rows; all ranks
    call it, so it may be a collective."""
    path = job.log.path / "metrics.jsonl"
    logged = job.broadcast([row["step"] for row in read_rows(path)] if path.exists() else [])
    if number not in logged:
        job.log.log_step(number, *measure())


def iteration_metrics(iteration: Iteration) -> dict[str, float]:
    """The last step of both trainings, and how many questions were posed and kept, from the iteration's files."""
    rows = {player: read_rows(iteration.folder / player / "metrics.jsonl")[-1] for player in ("challenger", "solver")}
    counts = read_json(iteration.folder / "posed.json")
    metrics = {f"challenger_{key}": rows["challenger"][key] for key in CHALLENGER_METRICS if key in rows["challenger"]}
    metrics |= {key: value for key, value in rows["solver"].items() if key.startswith(("accuracy_", "stderr_"))}
    return metrics | {f"questions_{name}": float(count) for name, count in counts.items()}


def question_rows(bank: Bank, iteration: int, limit: int) -> list[dict]:
    """Rows of samples.jsonl: the first questions that an iteration kept."""
    return [
        {"question": q.question, "label": q.label, "pass_rate": q.pass_rate}
        for q in islice(bank.read([iteration]), limit)
    ]


def draw_diversity(run_dir: Path, bank: Bank) -> None:
    """Write run_dir/diversity.svg: accuracy and repetition over the iterations, and a map of the questions."""
    vectors = [np.concatenate(list(bank.embeddings([number]))) for number in bank.iterations()]
    maps = project_to_plane(vectors) if vectors[0].shape[1] else ()
    record = SelfplayRecord(read_rows(run_dir / "metrics.jsonl"), maps)
    (run_dir / "diversity.svg").write_bytes(diversity_figure({"": [record]}))
