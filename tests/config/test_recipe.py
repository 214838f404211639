"""Facts of the recipes in configs/ that no single number says: what they select by, ask and keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vold import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = CONFIGS / "qwen2.5-vl-3b"
TRAINED = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.stem not in ("eval", "export", "skypilot")]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_recipe_selects_by_the_set_that_is_reported(path):
    reported = yaml.safe_load((RECIPE / "eval.yaml").read_text())["evaluation"]["sets"].values()
    evaluation = yaml.safe_load(path.read_text()).get("evaluation", {})
    sets = evaluation.get("sets", {})
    if path.parent.name != "methods" and "best" in evaluation:
        assert sets[evaluation["best"]]["split"] == "validation"
    places = [(one["path"], one.get("split")) for one in sets.values()]
    assert not {(one["path"], one["split"]) for one in reported} & {*places}


def test_stage_0_asks_for_no_box_and_stages_2_and_evaluation_do():
    traces, rl = load_config(RECIPE / "traces.yaml"), load_config(RECIPE / "vold.yaml")
    assert traces.prompt.without_grading().suffix_text == "" and "boxed" in rl.prompt.suffix_text


def test_a_sequence_of_stage_2_is_as_long_as_table_4_says():
    for name in ("vold", "one-gpu", "second-act", "geometry3k"):
        config = load_config(RECIPE / f"{name}.yaml")
        assert config.prompt.max_tokens + config.rollout.max_new_tokens == 8192, name


def test_every_stage_of_the_recipe_asks_in_one_chat_template():
    """None names another one than the student's, so that SFT trains the prompts that RL and evaluation ask."""
    for name in ("sft", "vold", "second-act", "geometry3k", "eval"):
        assert load_config(RECIPE / f"{name}.yaml").prompt.chat_template is None, name


def test_dapo_keeps_groups_with_right_and_wrong_answers():
    config = load_config(RECIPE / "vold.yaml", str(CONFIGS / "methods" / "dapo.yaml"))
    assert config.rollout.dynamic_sampling.keep == "mixed" and config.objective.preset == "dapo"


def test_an_iteration_of_self_play_has_r_zeros_updates():
    config = load_config(RECIPE / "selfplay-diverse.yaml")
    for phase, updates, prompts in ((config.challenger, 160, 16), (config.solver, 60, 128)):
        assert phase.steps * phase.minibatches == updates
        assert phase.prompts_per_step == phase.minibatches * prompts


def test_a_student_that_thinks_has_a_teacher_that_thinks():
    assert load_config(RECIPE / "geometry3k.yaml").teacher.name.endswith("Thinking")
    assert load_config(RECIPE / "second-act.yaml").teacher is None
