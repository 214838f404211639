"""Measures and checks on a GPU what needs one, within nine minutes: docs/gpu.md says what and how.

    make gpu-day                                a machine with a GPU; wheels that it lacks come from .gpu-wheels
    make gpu-day ARGS=--dry-run                 the same code at tiny sizes on a CPU, into runs/gpu-day-dry
    make gpu-day ARGS="--previous runs/first"   goes on where the run with those results stopped

Writes into --out: parts.csv (what ran, and why not), rates.csv, checks.csv, kernels-cuda.csv, train_step-cuda.csv,
gpu-day.png, log.txt.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from .journal import DONE, FAILED, PLANNED, Journal, read_rows
from .schedule import ROOT, Part, Run, run_parts
from .wheels import FOLDER, install

SECONDS = 540.0
DRY_PATIENCE = 4
"""A dry run may take this many times the seconds: it has two cores, and other work beside it."""
PARTS = (
    Part("gemm", "benchmarks.gpu_day.gemm", 35),
    Part("numerics", "benchmarks.gpu_day.numerics", 90, interpret=True),
    Part("heads", "benchmarks.gpu_day.heads", 150),
    Part("train", "benchmarks.gpu_day.train", 120, fresh=True),
    Part("tests", "benchmarks.gpu_day.tests", 60),
    Part("rows", "benchmarks.gpu_day.rows", 30, interpret=True),
)
FIGURE = Part("figure", "benchmarks.gpu_day.figure", 20)


def main() -> int:
    started = time.monotonic()
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the running part's processes end with this one
    out = (options.out or ROOT / "runs" / ("gpu-day-dry" if options.dry_run else "gpu-day")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.previous:
        shutil.copytree(options.previous, out, dirs_exist_ok=True)
    patience = DRY_PATIENCE if options.dry_run else 1
    parts = [replace(x, seconds=patience * x.seconds) for x in PARTS if not options.parts or x.name in options.parts]
    options.seconds *= patience
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as site:
        journal = Journal(out / "parts.csv")
        installed = time.monotonic()
        for name, reason in install(options.wheels, Path(site)).items():
            journal.note(
                "wheels", name, FAILED if reason else DONE, seconds=time.monotonic() - installed, reason=reason
            )
        run = Run(out, options.seconds, started, FIGURE.seconds, _environment(site), options.dry_run)
        run_parts(parts, run)
        last = Run(out, options.seconds, started, 0.0, run.environment, options.dry_run)
        _forget_figure(journal)
        run_parts([FIGURE], last)
    _print_summary(out)
    return 0


def _environment(site: str) -> dict[str, str]:
    """Carried wheels, this checkout and its kernels before all else; no network, one thread for tests' sake."""
    paths = [site, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return dict(os.environ) | own


def _forget_figure(journal: Journal) -> None:
    """The figure is drawn anew by every run."""
    for item in journal.states(FIGURE.name):
        journal.note(FIGURE.name, item, PLANNED)


def _print_summary(out: Path) -> None:
    """The last lines of the output, which a caller may see alone."""
    rows = {(row["part"], row["item"]): row for row in read_rows(out / "parts.csv")}
    for (part, item), row in rows.items():
        print(f"{part:<9} {item:<44.44} {row['status']:<8} {row['seconds']:>6} s  {row['reason'][:110]}")
    checks = read_rows(out / "checks.csv")
    failed = [row for row in checks if row["passed"] == "no"]
    print(f"{len(checks)} checks, {len(failed)} failed")
    for row in failed:
        print(f"  {row['check']}: {row['value']} (limit {row['limit']}) {row['note'][:160]}")
    print(out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on this machine's CPU")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the whole run ends before this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--previous", type=Path, help="results of an earlier run: what they finished is not repeated")
    parser.add_argument("--wheels", type=Path, default=ROOT / FOLDER)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
