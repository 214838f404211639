"""`python -m vold.miniature teachers`: two teachers, each right on its half of the problems, and both by a column.

The halves are the two ways in which a problem is written: in digits, `7*9+5*3`, and in words, `<7><*><9>…`. A
specialist is the miniature's teacher trained further: on its half it goes on writing right traces, on the other every
step of its traces is one too high. The student distils from one of them on every row, or on each row from the
one that the row's column `teacher` names; rewards count in all arms alike (preset mopd). Three seeds of SFT, order and
samples; the accuracies are of test problems, greedy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vold.config import load_config, schema
from vold.io import log, write_atomically
from vold.miniature import world
from vold.miniature.demo import commit, rl_paths, traces_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.measure import Checkpoint, Item
from vold.miniature.pipeline import CONFIGS, run_phases
from vold.miniature.pretrain import make_specialist
from vold.report import seeds_errorbars, seeds_table
from vold.report.tables import csv_text
from vold.run.job import free_device_memory
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl
from vold.train.sft import train_sft

SEEDS = (0, 1, 2)
STEPS = 15
RATE = "6e-4"  # the best of vold-unmasked, whose loss this is, in docs/methods.md
ARMS = ("digits-teacher", "words-teacher", "both-by-column")
COLUMNS = ("arm", "seed", *world.HALVES, "mean")
FILES: dict[str, world.Split] = {"train.jsonl": "train", "test_digits.jsonl": "test", "test_words.jsonl": "test"}


def run(root: Path = Path("runs"), *, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run all arms; write report.json, rows.csv, table.md and seeds.png below runs/several-teachers. Finished runs are
    kept. All run in this process, one after the other: starting one takes longer than a run's first steps."""
    started, out = time.perf_counter(), root / "several-teachers"
    made = make_world(root / "miniature" / "seed0", seed=0)
    run_phases([traces_phase(root / "reproduce", made)], parallel=1)
    data = write_halves(out / "data", seed=0)
    for half in world.HALVES:
        make_specialist(out / "teachers" / half, made.teacher, half, seed=0)
    rows = [row for seed in seeds for row in _seed_rows(out, made, data, root / "reproduce", seed)]
    teachers = {half: _teacher_accuracies(out / "teachers" / half, data) for half in world.HALVES}
    facts = {"rows": rows, "teachers": teachers, "steps": STEPS, "versions": versions(), "commit": commit()}
    write_report(out, rows, facts | {"wall_seconds": time.perf_counter() - started})


def write_halves(out: Path, seed: int, rows: int = 1536, tests: int = 400) -> Path:
    """The problems of all arms, with the name of a row's specialist in the column `teacher`. An existing folder is
    kept."""
    if out.exists():
        return out
    out.mkdir(parents=True)
    for stream, (name, split) in enumerate(FILES.items(), start=60):
        rng = np.random.default_rng([seed, stream])
        halves = world.HALVES if split == "train" else (name.removesuffix(".jsonl").removeprefix("test_"),)
        count = rows if split == "train" else tests
        lines = [_row(halves[number % len(halves)], split, rng) for number in range(count)]
        write_atomically(out / name, "".join(json.dumps(line) + "\n" for line in lines))
    return out


def _row(half: str, split: world.Split, rng: np.random.Generator) -> dict[str, str]:
    problem = world.sample_problem(rng, split)
    return {"problem": world.half_question(problem, rng, half), "answer": problem.answer, "teacher": half}


def _seed_rows(out: Path, made: MiniatureWorld, data: Path, reproduce: Path, seed: int) -> Iterable[dict]:
    """The start and every arm of a seed: {"arm", "seed", a half: accuracy, …, "mean"}."""
    folder = out / f"seed{seed}"
    traces = f"data.path={reproduce / 'traces' / 'traces'}"
    start = (f"student={made.base}", f"pair_with={made.teacher}", traces, f"seed={seed}", *_tests(data, 100))
    _train(schema.SftConfig, "sft.yaml", folder / "sft", start)
    yield _accuracies(folder / "sft", seed)
    for arm in ARMS:
        _train(schema.RlConfig, "rl.yaml", folder / arm, arm_overrides(arm, out, made, data, seed))
        yield _accuracies(folder / arm, seed)


def _teacher_accuracies(teacher: Path, data: Path, problems: int = 100) -> dict[str, float]:
    """Half -> accuracy on its first test problems, by transformers alone."""
    found, checkpoint = {}, Checkpoint(teacher)
    for half in world.HALVES:
        rows = map(json.loads, (data / f"test_{half}.jsonl").read_text().splitlines()[:problems])
        items = [Item([{"role": "user", "content": row["problem"]}], row["answer"]) for row in rows]
        found[half] = checkpoint.measure(items).accuracy
    return found


def arm_overrides(arm: str, out: Path, made: MiniatureWorld, data: Path, seed: int) -> tuple[str, ...]:
    """The settings of an arm, for vold/miniature/configs/rl.yaml."""
    teachers = {half: out / "teachers" / half for half in world.HALVES}
    chosen = [f"teacher={teachers.get(arm.removesuffix('-teacher'), made.teacher)}"]
    if arm == "both-by-column":
        several = ", ".join(f"{name}: {{path: {path}, engine: trainer}}" for name, path in teachers.items())
        chosen = ["teacher=null", f"teachers={{{several}}}", "teacher_column=teacher"]
    return (
        *rl_paths(made),
        *chosen,
        f"student={out / f'seed{seed}' / 'sft' / 'model'}",
        f"data.path={data / 'train.jsonl'}",
        "data.layout=geometry3k",
        "objective.preset=mopd",
        f"optimizer.lr={RATE}",
        f"steps={STEPS}",
        f"seed={seed}",
        *_tests(data, STEPS),
    )


def _tests(data: Path, every: int) -> tuple[str, ...]:
    """The accuracies that are reported, after the last step alone: nothing is chosen by them."""
    sets = ", ".join(f"{half}: {{path: {data}/test_{half}.jsonl, layout: geometry3k}}" for half in world.HALVES)
    sampling = "{max_new_tokens: 40, temperature: 0.0, sequences_per_call: 200}"
    return f"evaluation.every={every}", f"evaluation.sampling={sampling}", f"evaluation.sets={{{sets}}}"


def _train(kind: type[schema.RlConfig | schema.SftConfig], name: str, run_dir: Path, overrides: Sequence[str]) -> None:
    if (run_dir / "model").exists():
        return
    config = load_config(kind, CONFIGS / name, [*overrides, f"run_dir={run_dir}"])
    resume = (run_dir / "config.yaml").exists()
    if isinstance(config, schema.RlConfig):
        train_rl(config, resume=resume)
    else:
        train_sft(config, resume=resume)
    free_device_memory()


def _accuracies(run_dir: Path, seed: int) -> dict:
    last = read_rows(run_dir / "metrics.jsonl")[-1]
    found = {half: last[f"accuracy_{half}"] for half in world.HALVES}
    return {"arm": run_dir.name, "seed": seed, **found, "mean": sum(found.values()) / len(found)}


def write_report(out: Path, rows: Sequence[dict], facts: dict) -> None:
    """Write the tables and the figure of the rows."""
    write_atomically(out / "report.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(out / "rows.csv", csv_text(COLUMNS, ([row[key] for key in COLUMNS] for row in rows)))
    write_atomically(out / "table.md", seeds_table(rows) + "\n")
    (out / "seeds.png").write_bytes(seeds_errorbars(rows, fmt="png"))
    log.info(f"\n{seeds_table(rows)}\n\n{out / 'seeds.png'}")
