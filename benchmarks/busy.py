"""Times the heads beside materialised logits on a quiet CPU and on one that is busy, in one run.

    python -m benchmarks.busy                         quiet, then beside 4 spinning processes
    python -m benchmarks.busy --spinning 0 4 8 --rounds 6

Providers take turns (`harness.py`), so load from outside meets all alike; the ratio of medians is the claim, and
`load_average` says how quiet the machine was. Writes busy-cpu.csv into --out.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .harness import COLUMNS, Plan, csv_rows, environment, measure, table_line, write_rows
from .problem import LOGPROB, POLICY_LOSS, Case
from .providers import OURS

EAGER = "eager"
EXTRA_COLUMNS = ("spinning", "load_average", "over_eager")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = _options()
    device, facts = torch.device("cpu"), environment(torch.device("cpu"), options.threads)
    rows: list[dict[str, object]] = []
    for mode in (POLICY_LOSS, LOGPROB):
        for count in options.spinning:
            case = Case("small", mode, *options.shape, "float32")
            load = f"{os.getloadavg()[0]:.1f}"  # of the minute before
            with spinning(count):
                plan = Plan(rounds=options.rounds, threads=options.threads, timeout_s=1800)
                case_rows = csv_rows(case, measure(case, [OURS, EAGER], device, plan), facts)
            if failed := [row["reason"] for row in case_rows if row["reason"]]:
                raise SystemExit(f"busy: {'; '.join(map(str, failed))}")
            eager_s = next(float(str(row["median_s"])) for row in case_rows if row["provider"] == EAGER)
            for row in case_rows:
                over_eager = f"{float(str(row['median_s'])) / eager_s:.3f}"
                rows.append(row | {"spinning": count, "load_average": load, "over_eager": over_eager})
    write_rows(options.out / "busy-cpu.csv", rows, (*EXTRA_COLUMNS, *COLUMNS))
    shown = ("mode", "spinning", "provider", "median_s", "p20_s", "p80_s", "over_eager", "load_average")
    print("\n".join(table_line(map(str, line)) for line in [shown, ["---"] * len(shown)]))
    print("\n".join(table_line(str(row[name]) for name in shown) for row in rows))


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """That many processes that compute without end, beside what the block runs."""
    processes = [mp.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spinning", nargs="*", type=int, default=[0, 4], help="processes beside each measurement")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), default=(2048, 256, 151936))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
