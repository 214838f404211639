"""The second act: valid commands, a rate chosen on validation problems alone, and a table of what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vold.config import load_config, schema
from vold.miniature import second_act
from vold.miniature.examples import collate, vision_teacher_example
from vold.miniature.make import MiniatureWorld
from vold.miniature.pipeline import CONFIGS, Phase
from vold.miniature.pretrain import VISION_TEACHER_PHASE, make_vision_teacher
from vold.miniature.tokenizer import make_tokenizer
from vold.miniature.world import solve
from vold.objectives import build_objective

PATHS = second_act.SecondActPaths(Path("runs"), MiniatureWorld.at(Path("runs/miniature/seed0")))


def loaded(phase: Phase) -> schema.RlConfig | schema.EvalConfig:
    kind = {"rl": schema.RlConfig, "eval": schema.EvalConfig}[phase.verb]
    return load_config(kind, CONFIGS / phase.config, [*phase.overrides, f"run_dir={phase.run_dir}"])


@pytest.mark.parametrize("arm", second_act.ARMS, ids=lambda arm: arm.name)
def test_every_arm_trains_on_one_split_and_is_watched_on_another(arm):
    config = loaded(second_act._phase(PATHS, arm, "1e-4", 2))
    assert (config.steps, config.seed, config.optimizer.lr) == (second_act.STEPS, 2, 1e-4)
    assert config.data.path.name == f"train_{arm.problems}.jsonl"
    assert [data.path.name for data in config.evaluation.sets.values()] == [f"val_{arm.problems}.jsonl"]


def test_the_distilling_arms_differ_in_their_weights_alone():
    configs = {a.name: loaded(second_act._phase(PATHS, a, "1e-4", 0)) for a in second_act.ARMS}
    plain, weighed = (configs[name].model_dump() for name in ("vold-opd", "vold-va-opd"))
    assert plain.pop("run_dir") != weighed.pop("run_dir")
    assert (plain["objective"].pop("visual_advantage"), weighed["objective"].pop("visual_advantage")) == (False, True)
    assert plain == weighed
    objectives = [build_objective(configs[name].objective, 40) for name in ("vold-opd", "vold-va-opd")]
    assert [objective.visual_advantage for objective in objectives] == [False, True]


def test_the_vision_teacher_learns_traces_of_plain_and_of_small_digits():
    examples = [vision_teacher_example(np.random.default_rng(seed)) for seed in range(20)]
    assert {example.small is None for example in examples} == {True, False}
    for example in examples:
        response = example.segments[-1][0]
        assert f"\\boxed{{{solve(example.pictured).answer}}}" in response
    batch = collate(examples, make_tokenizer(), np.random.default_rng(0))
    assert len(batch["image_grid_thw"]) == len(examples)


def test_the_vision_teacher_goes_on_from_the_base_with_its_vision_tower(world, tmp_path):
    phase = replace(VISION_TEACHER_PHASE, steps=2, image_rows=3)
    teacher = make_vision_teacher(tmp_path / "teacher", world.base, 3, phase)
    assert len((teacher / "pretraining.jsonl").read_text().splitlines()) == 1
    before, after = (load_file(path / "model.safetensors") for path in (world.base, teacher))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("visual.blocks" in name for name in moved) and any("layers" in name for name in moved)
    (teacher / "pretraining.jsonl").write_text("kept")
    assert make_vision_teacher(teacher, world.base, 3, phase) == teacher
    assert (teacher / "pretraining.jsonl").read_text() == "kept"


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> list[Phase]:
    """Instead of training: 3e-4 is best on validation problems, everything else is a number by name and seed."""
    phases_run: list[Phase] = []
    best = {"1e-4": 0.3, "3e-4": 0.5, "1e-3": 0.4}

    def run_phases(phases, *, parallel):
        for phase in phases:
            phases_run.append(phase)
            phase.run_dir.mkdir(parents=True, exist_ok=True)
            seed = int("".join(part[4:] for part in phase.run_dir.parts if part in ("seed1", "seed2", "seed3")) or 0)
            if phase.verb == "eval":
                numbers = {
                    name: {"accuracy": 0.4 + seed / 100 + 0.1 * ("va-opd" in phase.run_dir.name)}
                    for name in ("text", "image", "small")
                }
                (phase.run_dir / "evaluation.json").write_text(json.dumps({"sets": numbers}))
            elif "second-act" in phase.run_dir.parts:
                accuracy = best[phase.run_dir.parent.name.removeprefix("lr-")]
                rows = [{"step": step, "accuracy_image": accuracy, "accuracy_small": accuracy} for step in (1, 2)]
                (phase.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(second_act, "run_phases", run_phases)
    monkeypatch.setattr(second_act, "make_world", lambda root, seed: MiniatureWorld.at(root))
    monkeypatch.setattr(second_act, "write_pictures", lambda out, seed: out)
    monkeypatch.setattr(second_act, "make_vision_teacher", lambda out, base, seed: out)
    monkeypatch.setattr(second_act, "_teacher_accuracy", lambda paths: {"image": 1.0, "small": 0.9})
    second_act.run(tmp_path, seeds=(1, 2, 3))
    return phases_run


def test_rates_are_tried_with_the_first_seed_and_the_best_is_used_by_the_others(made_up, tmp_path):
    trained = [p.run_dir for p in made_up if p.verb == "rl" and "second-act" in p.run_dir.parts]
    assert len(trained) == len(set(trained)) == len(second_act.ARMS) * (2 + 2)
    assert {path.parent.name for path in trained if "seed1" not in path.parts} == {"lr-3e-4"}


def test_the_table_has_means_errors_and_paired_differences(made_up, tmp_path):
    table = (tmp_path / "second-act" / "table.md").read_text()
    assert "| vold-va-opd |     3 | 52.0 ± 0.6 | 52.0 ± 0.6 | 52.0 ± 0.6 |" in table  # .51, .52, .53
    assert "| vold-va-opd - vold-opd on small |" in table and "| 10.0 ± 0.0 |" in table
    report = json.loads((tmp_path / "second-act" / "report.json").read_text())
    assert report["rates"] == {arm.name: "3e-4" for arm in second_act.ARMS}
    assert "30.0 at 1e-4, 50.0 at 3e-4" in table and "50.0 at 3e-4, 40.0 at 1e-3" in table
    assert (tmp_path / "second-act" / "second-act.png").read_bytes().startswith(b"\x89PNG")
