"""The chaos campaign's judgement: what it calls the same, and what it calls lost. `make chaos` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.chaos import table
from benchmarks.chaos_faults import FAULTS
from benchmarks.chaos_world import Lost, compare
from vold.io import append_jsonl


def finished(run_dir: Path, rewards=(0.0, 0.5, 1.0), weight: float = 1.0, seconds: float = 1.0) -> Path:
    for folder in ("model", "checkpoints/step-000003"):
        (run_dir / folder).mkdir(parents=True)
        save_file({"a": torch.tensor([weight, 2.0])}, run_dir / folder / "rank-00000.safetensors")
    rows = [{"step": step, "reward": reward, "seconds_train": seconds} for step, reward in enumerate(rewards, 1)]
    append_jsonl(run_dir / "metrics.jsonl", rows)
    return run_dir


def test_what_is_the_same(tmp_path):
    whole = finished(tmp_path / "whole")
    compare(finished(tmp_path / "later", seconds=9.0), whole, exact=True)
    rounded = finished(tmp_path / "rounded", rewards=(0.0, 0.5, 0.99), weight=1.00001)
    compare(rounded, whole, exact=False)
    for name, other, said in [
        ("row", {"rewards": (0.0, 0.5, 0.99)}, r"metrics.jsonl: step 3 differs in \['reward'\]"),
        ("weight", {"weight": 1.00001}, "model/rank-00000.safetensors differs"),
        ("short", {"rewards": (0.0, 0.5)}, r"metrics.jsonl: steps \[1, 2\]"),
    ]:
        with pytest.raises(Lost, match=said):
            compare(finished(tmp_path / name, **other), whole, exact=True)
    changed = finished(tmp_path / "named", rewards=(0.0, 0.7, 1.0))
    compare(changed, whole, exact=True, unchecked=("metrics.jsonl",))
    with pytest.raises(Lost):
        compare(finished(tmp_path / "far", weight=1.1), whole, exact=False)


def test_the_table_has_a_row_for_each_fault():
    page = table({fault: [2, 1] for fault in FAULTS}, ["try 3, SIGHUP:\n  hangs"], "about")
    assert all(f"| {fault} | 2 | 1 | 1 |" in page for fault in FAULTS)
    assert f"| **all** | **{2 * len(FAULTS)}** | **{len(FAULTS)}** | **{len(FAULTS)}** |" in page
    assert "- try 3, SIGHUP: hangs" in page
