"""Times every kernel beside its peers, then writes the ahead-of-time table, the summary and the plots.

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
from .harness import Plan, csv_rows, environment, measure, write_rows
from .problem import CROSS_ENTROPY, LOGPROB, POLICY_LOSS, Case
from .providers import PROVIDERS
from .summary import MODES

RESULTS = Path(__file__).parent / "results"
VOCAB = 151936
HEADS = {"student": 2048, "teacher": 4096}
TOKENS = (2048, 8192, 32768, 131072)


def cpu_cases() -> list[Case]:
    """One shape, the real vocabulary at a width that a CPU computes in seconds."""
    return [Case("small", mode, 2048, 256, VOCAB, "float32") for mode in (POLICY_LOSS, LOGPROB)]


def gpu_cases() -> list[Case]:
    cells = [(mode, head) for mode in (POLICY_LOSS, LOGPROB) for head in HEADS] + [(CROSS_ENTROPY, "student")]
    return [Case(head, mode, tokens, HEADS[head], VOCAB, "bfloat16") for mode, head in cells for tokens in TOKENS]


def plan_of(case: Case, options: argparse.Namespace, device: torch.device) -> Plan:
    if device.type == "cpu":
        return Plan(rounds=options.rounds or 4, threads=options.threads)
    is_long = case.tokens > 8192
    return Plan(
        rounds=options.rounds or 6, runs=2 if is_long else 5, warmup_runs=1 if is_long else 2, threads=options.threads
    )


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, measured_rows = environment(device, options.threads), []
    for case in _chosen(cpu_cases() if device.type == "cpu" else gpu_cases(), options):
        results = measure(case, options.providers or list(PROVIDERS), device, plan_of(case, options, device))
        case_rows = csv_rows(case, results, facts)
        measured_rows += case_rows
        write_rows(options.out / f"kernels-{device.type}.csv", measured_rows)
        _print_rows(case, case_rows)
    if not options.no_aot:
        aot.write(options.out / "aot.csv")
    plot.write(options.out)
    summary.write(options.out)
    print(options.out / "SUMMARY.md")


def _chosen(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    if options.shape:
        cases = [Case("one", mode, *options.shape, cases[0].dtype) for mode in (POLICY_LOSS, LOGPROB)]
    selection = {"mode": options.mode, "head": options.head, "tokens": options.tokens}
    return [case for case in cases if all(getattr(case, key) in value for key, value in selection.items() if value)]


def _print_rows(case: Case, case_rows: list[dict[str, object]]) -> None:
    print(f"\n{case.head} {case.mode}: N {case.tokens}, D {case.hidden}, V {case.vocab}, {case.dtype}", flush=True)
    for row in case_rows:
        if row["status"] != "measured":
            print(f"  {row['provider']:<18} {row['status']}: {row['reason']}", flush=True)
            continue
        times = f"{row['median_s']} s [{row['p20_s']}, {row['p80_s']}]"
        print(f"  {row['provider']:<18} {times}  {row['peak_extra_mib']:>8} MiB", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), help="one cell instead of the sweep")
    parser.add_argument("--mode", nargs="*", choices=MODES)
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
