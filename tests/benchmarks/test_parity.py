"""The layouts that hold every mechanism between them (the whole table is `python -m benchmarks.parity`)."""

from __future__ import annotations

import csv

import pytest

LAYOUTS = ("tp2+sp", "pp2-vpp2", "pp4-vpp2", "tp2-dp2", "tp2-pp2-dp2+sp+distopt")

LORA = ("tp2+sp", "pp2-dp2", "dp2+distopt")
MIXTURE = ("pp2-vpp2-ep2", "tp2-dp2-ep2-etp2+sp")
CASES = [("tied", LAYOUTS), ("tied-llama", ("tp2-pp2",)), ("tied-lora", LORA), ("untied-qwen3moe", MIXTURE)]
CASES += [("tied-qwen35", ("tp2-pp2+sp",))]


@pytest.mark.parametrize(("head", "layouts"), CASES)
def test_layouts_equal_one_process_and_transformers(head, layouts, launch, tmp_path):
    arguments = ("--layouts", *layouts, "--heads", head, "--out", tmp_path)
    run = launch(1, "-m", "benchmarks.parity", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "parity.csv").open() as file:
        rows = {row["layout"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"one process", *layouts}
    for name, row in rows.items():
        compared = {key for key, value in row.items() if " vs " in key and value}
        assert {"loss vs transformers", "parameter vs transformers"} <= compared, name
        assert "distopt" in name or "gradient vs transformers" in compared, name
