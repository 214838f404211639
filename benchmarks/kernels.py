"""Every kernel beside its peers; then the ahead-of-time table, the summary and the plots.

    python -m benchmarks.kernels                                    this machine's sweep: CPU (under 10 minutes) or GPU
    python -m benchmarks.kernels --head student --tokens 8192       part of it
    python -m benchmarks.kernels --shape 64 32 512 --out /tmp/b     one small cell

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
    cells = [(mode, head) for mode in ("full", "forward") for head in HEADS] + [("ce", "student")]
    return [Case(head, mode, tokens, HEADS[head], VOCAB, "bfloat16") for mode, head in cells for tokens in TOKENS]


def plan_of(case: Case, options: argparse.Namespace, device: torch.device) -> Plan:
    if device.type == "cpu":
        return Plan(rounds=options.rounds or 4, threads=options.threads)
    long = case.tokens > 8192
    return Plan(rounds=options.rounds or 6, runs=2 if long else 5, warm=1 if long else 2, threads=options.threads)


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known, found = facts(device, options.threads), []
    for case in _chosen(cpu_cases() if device.type == "cpu" else gpu_cases(), options):
        results = measure(case, options.providers or list(PROVIDERS), device, plan_of(case, options, device))
        fresh = rows(case, results, known)
        found += fresh
        write_rows(options.out / f"kernels-{device.type}.csv", found)
        _show(case, fresh)
    if not options.no_aot:
        aot.write(options.out / "aot.csv")
    plot.write(options.out)
    summary.write(options.out)
    print(options.out / "SUMMARY.md")


def _chosen(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    if options.shape:
        cases = [Case("one", mode, *options.shape, cases[0].dtype) for mode in ("full", "forward")]
    wanted = {"mode": options.mode, "head": options.head, "tokens": options.tokens}
    return [case for case in cases if all(getattr(case, key) in value for key, value in wanted.items() if value)]


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
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), help="one cell instead of the sweep")
    parser.add_argument("--mode", nargs="*", choices=("full", "forward", "ce"))
    parser.add_argument("--head", nargs="*")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--providers", nargs="*", choices=PROVIDERS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-aot", action="store_true", help="skip the ahead-of-time table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
