"""The fused heads beside their peers at the real sizes: benchmarks/kernels.py's cases, within a GPU day's seconds.

First the three cells that matter most at 8192 tokens, then a longer one; torch.compile, which compiles for minutes, is
last, beside the floor alone. Rows as `make bench` writes them: kernels-cuda.csv.
"""

from __future__ import annotations

import os

from benchmarks.harness import COLUMNS, Plan, csv_rows, measure
from benchmarks.kernels import HEADS, VOCAB
from benchmarks.problem import CROSS_ENTROPY, LOGPROB, POLICY_LOSS, Case
from benchmarks.providers import FLOOR, OURS, PROVIDERS

from .part import Context, Item

COMPILED = "torch.compile"
CELLS = (
    ("student", POLICY_LOSS, 8192),
    ("teacher", LOGPROB, 8192),
    ("student", CROSS_ENTROPY, 8192),
    ("student", LOGPROB, 8192),
    ("student", POLICY_LOSS, 32768),
    ("teacher", LOGPROB, 32768),
)


def items(context: Context) -> list[Item]:
    names = [name for name in PROVIDERS if name != COMPILED]
    if context.dry_run:
        cases = [Case("student", mode, 48, 16, 301, "float32") for mode in (POLICY_LOSS, LOGPROB)]
        return [_item(case, [FLOOR, OURS, "eager", "QuACK"]) for case in cases]
    cases = [Case(head, mode, tokens, HEADS[head], VOCAB, "bfloat16") for head, mode, tokens in CELLS]
    return [*(_item(case, names) for case in cases), _item(cases[0], [FLOOR, OURS, COMPILED])]


def _item(case: Case, names: list[str]) -> Item:
    title = f"{case.head} {case.mode} {case.tokens}" + (f", {COMPILED}" if COMPILED in names else "")
    return Item(title, lambda context: _measure(context, case, names), 3 if case.tokens < 100 else 25)


def _measure(context: Context, case: Case, names: list[str]) -> None:
    is_long = case.tokens > 8192
    timeout = max(min(60.0, context.left() / 3), 5.0)
    plan = Plan(
        rounds=2 if is_long else 4,
        runs=2 if is_long else 3,
        warmup_runs=1,
        threads=1 if context.dry_run else len(os.sched_getaffinity(0)),
        timeout_s=timeout,
    )
    results = measure(case, names, context.device, plan)
    context.write(f"kernels-{context.device.type}.csv", csv_rows(case, results, context.facts), COLUMNS)
