"""Every kernel beside its peers; then the ahead-of-time table, the summary and the plots.

    python -m benchmarks.kernels                        the sweep of this machine: CPU under 10 minutes, or GPU
    python -m benchmarks.kernels --tokens 64 --hidden 32 --vocab 512 --out /tmp/bench          one small cell

Writes kernels-cpu.csv or kernels-cuda.csv (one file is one run), aot.csv, SUMMARY.md and the plots into --out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from . import aot, plot, summary
from .harness import Plan, facts, measure, rows, write_rows
from .problem import Case
from .providers import PROVIDERS

RESULTS = Path(__file__).parent / "results"
VOCAB = 151936
HEADS = {"student": 2048, "teacher": 4096}
TOKENS = (2048, 8192, 32768, 131072)


def cpu_cases() -> list[Case]:
    """The issue's shape."""
    return [Case("small", mode, 2048, 256, VOCAB, "float32") for mode in ("full", "forward")]


def gpu_cases() -> list[Case]:
    return [
        Case(head, mode, tokens, hidden, VOCAB, "bfloat16")
        for mode in ("full", "forward", "ce")
        for head, hidden in HEADS.items()
        for tokens in TOKENS
    ]


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = cpu_cases() if device.type == "cpu" else gpu_cases()
    if options.tokens:
        dtype = cases[0].dtype
        cases = [Case("one", m, options.tokens, options.hidden, options.vocab, dtype) for m in ("full", "forward")]
    cases = [case for case in cases if options.mode in (None, case.mode)]
    plan = Plan(rounds=options.rounds or 5, threads=options.threads)
    if device.type == "cuda":
        plan = Plan(rounds=options.rounds or 6, runs=5, warm=2, threads=options.threads)
    known, found = facts(device, plan.threads), []
    for case in cases:
        fresh = rows(case, measure(case, options.providers or list(PROVIDERS), device, plan), known)
        found += fresh
        write_rows(options.out / f"kernels-{device.type}.csv", found)
        _show(case, fresh)
    if not options.no_aot:
        aot.write(options.out / "aot.csv")
    plot.write(options.out)
    summary.write(options.out)
    print(f"{options.out / 'SUMMARY.md'}")


def _show(case: Case, fresh: list[dict[str, object]]) -> None:
    print(f"\n{case.head} {case.mode}: N {case.tokens}, D {case.hidden}, V {case.vocab}, {case.dtype}", flush=True)
    for row in fresh:
        if row["status"] != "measured":
            print(f"  {row['provider']:<18} {row['status']}: {row['reason']}", flush=True)
            continue
        times = f"{row['median_s']} s [{row['p20_s']}, {row['p80_s']}]"
        print(f"  {row['provider']:<18} {times}  {row['peak_extra_mib']:>8} MiB", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="one cell instead of the sweep")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--mode", choices=("full", "forward", "ce"))
    parser.add_argument("--providers", nargs="*", choices=PROVIDERS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-aot", action="store_true", help="skip the ahead-of-time table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
