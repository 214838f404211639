"""The tests marked `gpu`, then the kernels' own tests on the device: a row of checks.csv as each one ends."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from .part import CHECK_COLUMNS, Context, Item, verdict
from .schedule import ROOT

FILE = "checks.csv"
RESULT = re.compile(r"^(?P<test>tests/\S+::\S.*?) (?P<word>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b(?P<rest>.*)$")
KERNELS = ("test_linear_logprob.py", "test_layer_kernels.py", "test_linear_policy_loss.py", "test_linear_kl.py")
SECONDS_EACH = 40


def items(context: Context) -> list[Item]:
    marked = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    kernels = [ROOT / "tests" / "kernels" / name for name in KERNELS]
    if context.dry_run:
        kernels = kernels[:1]
    return [
        Item("marked gpu", lambda c: _pytest(c, ["-m", "gpu", *map(str, marked)]), 10),
        Item("kernels", lambda c: _pytest(c, ["-m", "", *map(str, kernels)]), 10),
    ]


def _pytest(context: Context, arguments: list[str]) -> None:
    options = ["-o", "addopts=", "-v", "-p", "no:cacheprovider", "-rs", "--no-header", f"--rootdir={ROOT}"]
    if importlib.util.find_spec("pytest_timeout"):
        options.append(f"--timeout={SECONDS_EACH}")
    command = [sys.executable, "-u", "-m", "pytest", *options, *arguments]
    passed, last = 0, ""
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="")
            last = line.strip() or last
            if found := RESULT.match(line):
                passed += found["word"] == "PASSED"
                context.write(FILE, [_row(found)], CHECK_COLUMNS)
    if tests.returncode not in (0, 1, 5) or (tests.returncode == 5 and not context.dry_run):
        raise RuntimeError(f"pytest ended with code {tests.returncode}: {last}")


def _row(found: re.Match) -> dict:
    row = verdict(found["test"], found["word"] not in ("FAILED", "ERROR"), found["rest"].strip(" []%0123456789"))
    return row | ({"passed": "skipped"} if found["word"] == "SKIPPED" else {})
