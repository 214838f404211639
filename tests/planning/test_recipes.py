"""The recipes for larger students, counted and planned without weights from the published config.json files."""

from __future__ import annotations

from pathlib import Path


def test_recipes_fit_the_gpus_that_they_name(launch):
    run = launch(1, Path(__file__).with_name("recipe_plans.py"))
    assert run.returncode == 0 and run.stdout.endswith("ok\n"), run.stdout + run.stderr
