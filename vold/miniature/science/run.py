"""`make reproduce PART=…`: a part's worlds, starts, sweeps and counted runs, on two cores, resumable; its report."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from vold.io import configure_logging, log
from vold.miniature.science.budget import budget
from vold.miniature.science.protocol import START, Cell, Part, Training, next_rates, part_folder, part_names, part_path
from vold.miniature.science.report import write_part
from vold.miniature.science.results import begin_with, chosen_rates, read_published, read_results, sweep_scores
from vold.miniature.science.runs import make_start, make_traces, run_training
from vold.miniature.worlds import WorldKeys, open_world


def run(
    root: Path = Path("runs"),
    *,
    parts: Sequence[str] = (),
    parallel: int = 2,
    only_budget: bool = False,
    published: Path | None = None,
) -> None:
    """Run parts by name (all without any); finished runs are kept. published: a folder with PART.jsonl, the runs of
    earlier results.jsonl, which count as finished. Raises ValueError for an unknown name."""
    for path in map(part_path, parts or part_names()):
        part = Part.load(path)
        if published is not None:
            file = published / f"{path.stem}.jsonl"
            runs = read_published(file) if file.exists() else []
            begin_with(root, path, runs)
            log.info(f"{path.stem}: {len(runs)} runs in {file}")
        log.info(f"{path.stem}: {part.claim}\n\n{budget(root, path, part)}")
        if not only_budget:
            run_part(root, path, part, parallel)
            write_part(root, path, part)


def run_part(root: Path, path: Path, part: Part, parallel: int) -> None:
    """Make worlds and starts, sweep rates to an inner optimum, then run what counts."""
    for world in dict.fromkeys(one.world for one in part.conditions.values() if one.world is not None):
        open_world(root, world, extras=part.extras)
    context = multiprocessing.get_context("spawn")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    part_folder(root, path).mkdir(parents=True, exist_ok=True)
    log_file = part_folder(root, path) / "workers.log"
    # no max_tasks_per_child: with it the pool can wait for ever for a worker that has ended (cpython issue 115634)
    with ProcessPoolExecutor(parallel, context, initializer=_begin_worker, initargs=(log_file,)) as pool:
        starts = part.trained_starts()
        _all(pool, "traces", make_traces, dict.fromkeys((root, world) for world, *_ in starts))
        _all(pool, "starts", make_start, [(root, *start) for start in starts])
        rates = sweep(root, path, part, pool)
        counted = [*part.counted(rates), *_starts_of(part)]
        _all(pool, "runs", run_training, [(root, path, part, training) for training in counted])


def sweep(root: Path, path: Path, part: Part, pool: ProcessPoolExecutor) -> dict[Cell, float]:
    """Cell -> its learning rate. All sweeps try their next rates together, until none has any."""
    waiting = {cell: part.arms[cell.arm].rates for cell in part.sweeps()}
    while waiting:
        tried = [training for cell, rates in waiting.items() for training in part.tried(cell, rates)]
        _all(pool, "sweep", run_training, [(root, path, part, training) for training in tried])
        tables = sweep_scores(read_results(part_folder(root, path)), part)
        waiting = {cell: more for cell, scores in tables.items() if (more := next_rates(scores, part.sweep.most))}
    return chosen_rates(read_results(part_folder(root, path)), part)


def _begin_worker(log_file: Path) -> None:
    """What a worker and its children print goes to the end of a file (each run has its own log in its folder, too); a
    worker ends with the process that started it, however that ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log_file.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    configure_logging()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _starts_of(part: Part) -> list[Training]:
    """Tests of the models that conditions start from, a row of the table."""
    return [
        Training(condition=name, arm=START, seed=seed, rate=0.0, swept=False)
        for seed in part.seeds
        for name, condition in part.conditions.items()
        if condition.start is not None
    ]


def _all(pool: ProcessPoolExecutor, what: str, job: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Every call of a job, with a line for each that ends. The first error ends the others that have not begun."""
    started, calls = time.perf_counter(), list(arguments)
    futures = {pool.submit(job, *call): call for call in calls}
    try:
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            minutes = (time.perf_counter() - started) / 60
            log.info(f"{what} {number}/{len(calls)} · {minutes:.1f} min · {_name(futures[future])}")
    finally:
        for future in futures:
            future.cancel()


def _name(call: tuple[Any, ...]) -> str:
    last = call[-1]
    if isinstance(last, Training):
        return last.name
    return f"seed {last}" if isinstance(last, int) else "" if isinstance(last, WorldKeys) else str(last)
