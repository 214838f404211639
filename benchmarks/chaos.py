"""A campaign of faults against small runs, each compared with the uninterrupted run.

    python -m benchmarks.chaos --hours 1 --seed 0        writes benchmarks/results/chaos.md and prints the table
    python -m benchmarks.chaos --minutes 3 --seed 0 --out runs/chaos.md    what CI runs

A try is a run of a few steps (SFT or RL, lag 0 or 1, saves in the background or not, on one or two ranks) that suffers
one or two faults at random moments and is resumed after each, at times elsewhere or at another layout. It survives when
it then ends with the uninterrupted run's weights, moments, random state, metrics, prompts and samples, bit for bit; at
another layout, with its rows and, within rounding, its weights. A run at lag 1 is compared with one that was stopped in
order after the same steps, since a resumed run samples again what was under way. Everything else is lost: other
numbers, a step twice or never, a traceback, a process that does not end, a refusal that names no file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vold.io import log, write_atomically

from .chaos_faults import ALONE, FAULTS, FLIPS, Try
from .chaos_world import Lost, Variant, World
from .harness import environment


def attempt(world: World, fault: str, rng: random.Random, number: int) -> None:
    """One try with `fault`, and in a third of them another before. Raises Lost."""
    kind = rng.choice(["sft", "sft", "rl", "rl-lag1"])
    if fault in ALONE:
        kind = "sft"  # at another layout sampled tokens may differ by rounding
    variant = Variant(kind, rng.choice([1, 2]) if fault != "SIGKILL of one rank" else 2, rng.random() < 0.5)
    run = Try(world, variant, rng, world.root / "runs" / f"{number:05d}")
    before = [rng.choice([name for name in FAULTS if name not in ALONE])] if rng.random() < 0.33 else []
    log.info(f"{number:4d} {fault}{' after ' + before[0] if before else ''}: {variant}")
    for name in (*before, fault):
        if not (run.run_dir / "model").exists():
            FAULTS[name](run)
    run.finish()
    shutil.rmtree(run.run_dir)


def campaign(
    seconds: float, seed: int, report: Callable[[dict[str, list[int]], list[str]], None], only: str = ""
) -> list[str]:
    """Tries for so long, every fault whose name has `only` in it in turn; after each, report(fault -> [tries,
    survived], what was lost). Returns what was lost."""
    root = Path(tempfile.mkdtemp(prefix="vold-chaos-"))
    world, rng = World.make(root), random.Random(seed)
    chosen = [fault for fault in [*FAULTS, *FLIPS] if only in fault]  # many files to flip
    counts, lost = {fault: [0, 0] for fault in chosen}, []
    started, number = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for fault in rng.sample(chosen, len(chosen)):
            if time.monotonic() - started >= seconds:
                break
            number += 1
            counts[fault][0] += 1
            try:
                attempt(world, fault, random.Random(seed * 1_000_003 + number), number)
                counts[fault][1] += 1
            except Exception as error:  # the campaign's own mistakes are no survivals either
                lost.append(f"try {number}, {fault}: {error if isinstance(error, Lost) else repr(error)}")
                log.warning(f"{lost[-1]} (kept in {root})")
            report(counts, lost)
    if not lost:
        shutil.rmtree(root)
    return lost


def table(counts: dict[str, list[int]], lost: list[str], about: str) -> str:
    """A Markdown page: fault x tries x survived x lost."""
    lines = ["# Chaos", "", about, "", "| fault | tries | survived | lost |", "|:--|--:|--:|--:|"]
    lines += [f"| {fault} | {tries} | {survived} | {tries - survived} |" for fault, (tries, survived) in counts.items()]
    tries, survived = (sum(column) for column in zip(*counts.values(), strict=True))
    lines += [f"| **all** | **{tries}** | **{survived}** | **{tries - survived}** |", ""]
    return "\n".join([*lines, *(f"- {' '.join(line.split())[:300]}" for line in lost), *([""] if lost else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults that have this in their name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.md")
    options = parser.parse_args()
    seconds = 3600 * options.hours + 60 * options.minutes
    if seconds <= 0:
        parser.error("give --hours or --minutes")
    os.environ["OMP_NUM_THREADS"] = "1"
    from vold.io import configure_logging

    configure_logging()
    about = f"`python -m benchmarks.chaos`, seed {options.seed}"
    about += "".join(f"; {name} {value}" for name, value in environment(torch.device("cpu"), 1).items())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report(counts: dict[str, list[int]], lost: list[str]) -> None:
        minutes = (time.monotonic() - started) / 60
        write_atomically(options.out, table(counts, lost, f"{about}; {minutes:.0f} minutes."))

    if not any(options.only in fault for fault in FAULTS):
        parser.error(f"--only {options.only} is in none of: {', '.join(FAULTS)}")
    lost = campaign(seconds, options.seed, report, options.only)
    log.info(options.out.read_text())
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
