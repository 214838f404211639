"""A GPU day's scheduler: budgets, parts that hang or crash, a first run that was taken away, rows on disk; the manifest
of wheels; and that every part names its items without a GPU."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_day import schedule, wheels
from benchmarks.gpu_day.__main__ import FIGURE, PARTS, SECONDS
from benchmarks.gpu_day.journal import DONE, FAILED, NO_TIME, Journal, append_rows, read_rows
from benchmarks.gpu_day.part import Context, check
from benchmarks.gpu_day.schedule import Part, Run, run_parts

ROOT = Path(__file__).parents[2]
MODULE = "support.gpu_parts"


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return dict(os.environ) | {"PYTHONPATH": paths}


def run_of(out: Path, seconds: float, reserve: float = 0.0) -> Run:
    return Run(out, seconds, time.monotonic(), reserve, environment())


def states(out: Path, part: str) -> dict[str, str]:
    return Journal(out / "parts.csv").states(part)


def rows(out: Path) -> list[str]:
    return [row["item"] for row in read_rows(out / "rows.csv")]


def reasons(out: Path) -> dict[str, str]:
    return {row["item"]: row["reason"] for row in read_rows(out / "parts.csv") if row["reason"]}


@pytest.fixture(scope="module")
def whole_day(tmp_path_factory) -> tuple[Path, float]:
    """(results, seconds) of a day on which everything goes wrong."""
    out = tmp_path_factory.mktemp("day")
    parts = [Part(name, MODULE, 60) for name in ("good", "crashes")]
    parts += [Part("hangs", MODULE, 6), Part("broken", "support.gpu_part_broken", 60), Part("slow", MODULE, 6)]
    started = time.monotonic()
    run_parts(parts, run_of(out, 120))
    return out, time.monotonic() - started


def test_a_part_that_crashes_goes_on_behind_the_item_that_did(whole_day):
    out, _ = whole_day
    wanted = {"c": DONE, "crashes": FAILED, "d": DONE, "fails": FAILED, "e": DONE}
    assert states(out, "crashes") == wanted and states(out, "good") == {"a": DONE, "b": DONE}
    assert reasons(out)["crashes"] == "the process ended with signal 11: illegal memory access"
    assert reasons(out)["fails"] == "RuntimeError: no kernel image for this device"
    processes = {row["item"]: row["process"] for row in read_rows(out / "rows.csv")}
    assert processes["a"] == processes["b"] and len({processes[item] for item in "cde"}) == 3


def test_a_part_that_hangs_is_killed_with_what_it_started_and_its_other_items_run(whole_day):
    out, seconds = whole_day
    assert states(out, "hangs") == {"before": DONE, "hangs": FAILED, "after": DONE}, "in the second round"
    assert "stopped at its limit of 6 s" in reasons(out)["hangs"] and seconds < 100
    child = Path("/proc", (out / "child.pid").read_text(), "stat")
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert "hang" in (out / "log.txt").read_text(), "the traceback says where it hung"


def test_a_part_that_cannot_be_imported_is_a_row_with_the_package(whole_day):
    out, _ = whole_day
    assert states(out, "broken") == {"": FAILED}
    assert "No module named 'a_package_that_is_not_installed'" in reasons(out)[""]


def test_what_has_no_time_runs_with_the_seconds_that_others_left(whole_day):
    out, _ = whole_day
    assert states(out, "slow") == {"f": DONE, "slow": DONE}
    assert "needs 12 s" in reasons(out)["slow"], "it had no time in the first round"
    assert rows(out) == ["a", "b", "c", "d", "e", "before", "hang began", "f", "after", "slow"]


def test_nothing_starts_near_the_deadline(tmp_path):
    started = time.monotonic()
    run_parts([Part("good", MODULE, 60), Part("hangs", MODULE, 60)], run_of(tmp_path, 7, reserve=3))
    assert states(tmp_path, "good") == states(tmp_path, "hangs") == {"": NO_TIME}
    assert time.monotonic() - started < 7


def test_a_second_run_goes_on_where_the_first_was_taken_away(tmp_path):
    """The scheduler and its part are killed with SIGKILL, as a machine goes away; no row is lost or made twice."""
    code = (
        "import time; from pathlib import Path; from benchmarks.gpu_day.schedule import *\n"
        f"run_parts([Part('good', {MODULE!r}, 60), Part('waits', {MODULE!r}, 60)], "
        f"Run(Path({str(tmp_path)!r}), 120, time.monotonic()))"
    )
    first = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waited").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_tree(first.pid)
    first.wait()
    assert states(tmp_path, "waits") == {"g": DONE, "wait": "started", "h": "planned"}
    with (tmp_path / "parts.csv").open("a") as file:
        file.write("waits,h,do")  # a line that was being written
    run_parts([Part("good", MODULE, 60), Part("waits", MODULE, 60)], run_of(tmp_path, 60))
    assert states(tmp_path, "waits") == {"g": DONE, "wait": DONE, "h": DONE}
    assert rows(tmp_path) == ["a", "b", "g", "wait", "h"]


def kill_tree(pid: int) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, 9)
    for child in map(int, children):
        os.killpg(child, 9)


def test_rows_are_whole_after_a_torn_line(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows(path, [{"a": 1, "b": "x, y"}], ("a", "b"))
    with path.open("a") as file:
        file.write("2,hal")
    append_rows(path, [{"a": 3}], ("a", "b"))
    assert read_rows(path) == [{"a": "1", "b": "x, y"}, {"a": "3", "b": ""}]


def test_the_parts_fit_into_the_nine_minutes_and_results_into_eight_files(tmp_path):
    assert sum(part.seconds for part in PARTS) + FIGURE.seconds + 30 <= SECONDS + 5 <= 600
    files = {
        "parts.csv",
        "rates.csv",
        "checks.csv",
        "kernels-cuda.csv",
        "train_step-cuda.csv",
        "gpu-day.png",
        "log.txt",
    }
    source = "".join(path.read_text() for path in Path(schedule.__file__).parent.glob("*.py"))
    named = set(re.findall(r'"([a-z-]+\.(?:csv|png|txt))"', source)) - {"wheels.txt", "wheels-large.txt"}
    assert named | {"kernels-cuda.csv", "train_step-cuda.csv"} == files and len(files) <= 8


@pytest.mark.parametrize("part", [*PARTS, FIGURE], ids=lambda part: part.name)
def test_every_part_names_its_items_without_a_gpu(part, tmp_path):
    for dry_run in (False, True):
        items = importlib.import_module(part.module).items(Context(tmp_path, dry_run))
        assert len({item.name for item in items}) == len(items) > 0
        assert dry_run or all(item.seconds < part.seconds for item in items)
    if part is not FIGURE:
        with pytest.raises(RuntimeError, match="ARGS=--dry-run"):
            _ = Context(tmp_path, False).device


def test_a_check_passes_within_its_limit_alone():
    assert check("x", 1.0, 1.0)["passed"] == "yes" and check("x", 1.1, 1.0)["passed"] == "no"
    assert check("x", float("nan"), 1.0)["passed"] == "no"


def test_the_wheels_are_the_pinned_versions(tmp_path):
    """Names and versions of the manifest, those of constraints.txt and constraints-bench.txt."""
    pins = {}
    for name in ("constraints-bench.txt", "constraints.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if "==" in line and not line.startswith("#"):
                package, version = line.split("==")
                pins[wheels._normal(package)] = version
    for name, line in wheels.entries(wheels.MANIFEST, wheels.LARGE).items():
        assert re.fullmatch(rf"{name}=={re.escape(pins[name])} --hash=sha256:[0-9a-f]{{64}}", line)


def test_a_wheel_that_is_not_there_is_a_reason_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_is_installed", lambda name: name != "dill")
    assert wheels.install(tmp_path / "none", tmp_path / "site") == {"dill": "no wheel in none"}
    folder = tmp_path / "wheels"
    folder.mkdir()
    version = wheels.entries(wheels.MANIFEST)["dill"].split()[0].split("==")[1]
    (folder / f"dill-{version}-py3-none-any.whl").write_bytes(b"not the file of the manifest")
    assert wheels.install(folder, tmp_path / "site")["dill"].startswith("ERROR")
