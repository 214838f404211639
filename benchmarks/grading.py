r"""Answers per second of the grader, and the cost of answers that never end.

    python -m benchmarks.grading             two workers; writes results/grading.csv and prints the table
    python -m benchmarks.grading --tables    agreement with published verdict tables, and each disagreement
    python -m benchmarks.grading --tables math_verify-0.9.0/tests math_equivalence_test.py

Answers are generated, all different, half of them wrong. `ordinary` has MATH-500's shares: 82 % of its golds are
decided by the policy alone (numbers, choices, words, bases), 18 % need the parser (a surd, polynomial, pair, interval,
complex number); `algebra` has only the latter. A share `hung` of the answers never ends by itself (`3700001!`); each
costs a worker: its CPU seconds and the start of the next one. Workers are started before the measurement.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from pathlib import Path

import psutil
import torch

from vold.grading import Grader

from .harness import environment, table_line, write_rows
from .verdict_tables import agreement, read_tables

PARSED_SHARE = {"ordinary": 0.18, "algebra": 1.0}
HUNG = (0.0, 0.01)


def question(number: int, parsed: bool, right: bool) -> tuple[str, str]:
    """(answer, gold) of the `number`-th kind and size; where the answer is wrong, the gold has another number."""
    n, k = number + 2, 2 + number % 8
    m = n if right else n + 1
    decided = (
        (f"{n:,}", str(m)),
        (rf"\frac{{{n * k}}}{{{7 * k}}}", rf"\dfrac{{{m}}}{{7}}"),
        (f"{n}.50", f"{m}.5"),
        (rf"{n}\text{{ cm}}", f"{m} cm"),
        (rf"x = {n}", str(m)),
    )
    undecided = (
        (rf"\sqrt{{{k * k * n}}}", rf"{k}\sqrt{{{m}}}"),
        (rf"x^2+{n + k}x+{n * k}", rf"(x+{m})(x+{k})"),
        (rf"({k}, \frac{{{n}\pi}}{{2}})", rf"\left({k},\frac{{{m}}}{{2}}\pi\right)"),
        (rf"{k} < x \le {n + k}", rf"({k},{m + k}]"),
        (rf"{k}i + {n}", rf"{m}+{k}i"),
    )
    return (undecided if parsed else decided)[number % 5]


def items(mix: str, count: int, hung: float) -> list[tuple[str, str, bool]]:
    """(response, gold, truncated) of `count` rows."""
    rng, rows = random.Random(0), []
    hung_rows = set(rng.sample(range(count), round(hung * count)))
    for number in range(count):
        answer, gold = question(number, parsed=rng.random() < PARSED_SHARE[mix], right=rng.random() < 0.5)
        if number in hung_rows:
            answer, gold = f"{3_700_001 + number}!", "7"
        rows.append((rf"<think>...</think> So it is \boxed{{{answer}}}.", gold, False))
    return rows


def measure(mix: str, count: int, hung: float, workers: int) -> dict[str, object]:
    with Grader(workers=workers) as grader:
        grader.grade([(rf"\boxed{{\sqrt{{{4 * n}}}}}", rf"2\sqrt{{{n}}}", False) for n in range(2, 42)])
        rows, before, started = items(mix, count, hung), _cpu_seconds(), time.perf_counter()
        verdicts = grader.grade(rows)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - before
        counters = grader.counters
    outcomes = [verdict.outcome for verdict in verdicts]
    return {
        "mix": mix,
        "hung": f"{hung:.1%}",
        "workers": workers,
        "answers": count,
        "parsed": sum(verdict.rule in ("algebra", "unparsed", "timeout") for verdict in verdicts),
        "correct": outcomes.count("correct"),
        "timeouts": counters["timeouts"],
        "broken": counters["broken"],
        "seconds": f"{seconds:.2f}",
        "answers_per_s": f"{count / seconds:.0f}",
        "cpu_s": f"{cpu:.2f}",
        "answers_per_cpu_s": f"{count / cpu:.0f}",
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and all its workers, running and ended. Other load hardly changes them."""
    times = [psutil.Process().cpu_times(), *(child.cpu_times() for child in psutil.Process().children())]
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(t.user + t.system for t in times) + dead.ru_utime + dead.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/grading.csv")
    parser.add_argument("--tables", type=Path, nargs="*", help="test files of other graders, or folders of them")
    options = parser.parse_args()
    if options.tables is not None:
        print("\n".join(agreement(read_tables(options.tables))))
        return
    plans = [(mix, hung) for mix in PARSED_SHARE for hung in HUNG[: 2 if mix == "ordinary" else 1]]
    facts = environment(torch.device("cpu"), options.workers)
    rows = [measure(mix, options.answers, hung, options.workers) | facts for mix, hung in plans]
    write_rows(options.out, rows, list(rows[0]))
    printed_columns = (
        "mix",
        "hung",
        "answers",
        "parsed",
        "timeouts",
        "broken",
        "seconds",
        "answers_per_s",
        "cpu_s",
        "answers_per_cpu_s",
    )
    print(table_line(printed_columns), table_line("--" for _ in printed_columns), sep="\n")
    for row in rows:
        print(table_line(str(row[key]) for key in printed_columns))


if __name__ == "__main__":
    main()
