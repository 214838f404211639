"""Summary and plots from made-up rows: provider times here are invented and never leave tmp_path."""

from pathlib import Path

import pytest

from benchmarks import plot, summary
from benchmarks.harness import COLUMNS, write_rows
from benchmarks.providers import FLOOR, OURS


def made_up(provider: str, seconds: float, mib: float, **more: object) -> dict[str, object]:
    row = dict.fromkeys(COLUMNS, "") | {"head": "made-up", "mode": "full", "tokens": 8, "hidden": 4, "vocab": 16}
    row |= {"dtype": "float32", "provider": provider, "status": "measured", "median_s": seconds, "runs": 3}
    row |= {"p20_s": seconds * 0.9, "p80_s": seconds * 1.1, "peak_extra_mib": mib, "over_floor": seconds}
    return row | {"device": "a made-up machine", "package": "p", "package_version": "1", "loss_error": "1e-7"} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        made_up(FLOOR, 1.0, 10),
        made_up(OURS, 2.0, 30),
        made_up("eager", 8.0, 300),
        made_up("TRL chunked", 4.0, 90),
    ]
    rows.append(made_up("verl", 0, 0, status="not available", reason="needs a GPU", median_s="", p20_s="", p80_s=""))
    write_rows(tmp_path / "kernels-cpu.csv", rows)
    lines = [made_up(n, t * k, 10 * t, tokens=t, mode="forward") for n, k in ((OURS, 1), ("eager", 2)) for t in (8, 16)]
    write_rows(tmp_path / "kernels-cuda.csv", lines)
    return tmp_path


def test_summary_says_what_the_rows_say(folder: Path):
    summary.write(folder)
    text = (folder / "SUMMARY.md").read_text()
    assert f"{OURS} takes 0.50 × the time of the fastest peer (TRL chunked)" in text
    assert "0.33 × the memory of the leanest (TRL chunked), 0.10 × that of eager." in text
    assert "Not available: verl (needs a GPU)." in text
    order = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and "a made" not in line]
    assert order[2:6] == [f"| {name}" for name in (FLOOR, OURS, "TRL chunked", "eager")]


def test_without_a_gpu_run_the_summary_says_so(folder: Path):
    (folder / "kernels-cuda.csv").unlink()
    summary.write(folder)
    assert "Not measured. On a machine with a GPU: `make bench`." in (folder / "SUMMARY.md").read_text()


def test_plots_are_written_for_bars_and_for_lines(folder: Path):
    plot.write(folder)
    for stem in ("kernels-cpu-full-made-up", "kernels-cuda-forward-made-up"):
        assert all((folder / f"{stem}.{ending}").stat().st_size > 5000 for ending in ("png", "svg"))
