"""`vold check`: the real sizes without a GPU, and the table a person sees."""

from __future__ import annotations

from pathlib import Path


def test_every_rank_of_the_real_models_holds_its_part_of_the_checkpoint(launch):
    run = launch(1, Path(__file__).with_name("dry_run.py"))
    assert run.returncode == 0 and run.stdout.endswith("ok\n"), run.stdout + run.stderr


def test_the_command_prints_bytes_by_rank_and_writes_nothing(launch, world, tmp_path):
    overrides = [*world.overrides("rl", tmp_path / "run"), "parallel.tp=2"]
    run = launch(1, "-m", "vold", "check", "rl", "vold/miniature/configs/rl.yaml", *overrides, "--processes", "4")
    assert run.returncode == 0, run.stderr
    assert "4 processes, 2 copies of the model" in run.stdout and "tp 1 pp 0" in run.stdout
    assert not (tmp_path / "run").exists()
