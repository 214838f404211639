"""demo and reproduce: every phase's command line is valid, finished phases are kept, a failed one says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vold.config import load_config, schema
from vold.miniature import demo, reproduce
from vold.miniature.make import MiniatureWorld
from vold.miniature.pipeline import CONFIGS, Phase, run_phases

SCHEMAS = {
    "traces": schema.TracesConfig,
    "sft": schema.SftConfig,
    "rl": schema.RlConfig,
    "eval": schema.EvalConfig,
}
WORLD = MiniatureWorld.at(Path("runs/miniature/seed0"))


def all_phases() -> list[Phase]:
    planned = demo.phases(Path("runs/demo"), WORLD)
    planned += reproduce._stages(Path("runs/reproduce"), Path("runs/reproduce/seed1"), WORLD, seed=1)
    return [phase for group in planned for phase in group]


@pytest.mark.parametrize("phase", all_phases(), ids=lambda phase: str(phase.run_dir))
def test_every_phase_has_a_valid_command(phase):
    config = load_config(SCHEMAS[phase.verb], CONFIGS / phase.config, [*phase.overrides, f"run_dir={phase.run_dir}"])
    assert phase.steps == getattr(config, "steps", 0), "the progress bar counts the steps that will be run"
    if phase.verb == "rl":
        assert config.objective.preset in phase.run_dir.name


def test_the_four_models_are_evaluated_on_the_same_held_out_problems():
    evaluated = [phase for phase in all_phases() if phase.verb == "eval" and "demo" in str(phase.run_dir)]
    assert {phase.run_dir.name for phase in evaluated} == {f"eval_{name}" for name in demo.MODELS}
    assert len({phase.overrides[1:] for phase in evaluated}) == 1
    assert "test_image.jsonl" in str(evaluated[0].overrides)
    trained = [override for phase in all_phases() if phase.verb in ("sft", "rl") for override in phase.overrides]
    assert not any("test_" in override for override in trained)


def test_a_finished_phase_is_kept_and_a_failed_one_says_why(tmp_path, capsys):
    done = Phase("eval", "eval.yaml", tmp_path / "done")
    done.run_dir.mkdir()
    (done.run_dir / "evaluation.json").write_text("{}")
    assert run_phases([done], side_by_side=2) == {}
    broken = Phase("eval", "eval.yaml", tmp_path / "broken", ("checkpoint=/nowhere",))
    with pytest.raises(RuntimeError, match=r"(?s)broken failed .*vold: "):
        run_phases([broken], side_by_side=1)


def test_the_demo_report_holds_every_model_and_set(tmp_path):
    for place, name in enumerate(demo.MODELS):
        run_dir = tmp_path / f"eval_{name}"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("verb: eval\n")
        numbers = {"accuracy": 0.1 * place, "stderr": 0.02, "n": 400}
        (run_dir / "evaluation.json").write_text(json.dumps({"sets": {"text": numbers, "image": numbers}}))
    for name in ("sft", "grpo", "vold"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"verb: {name}\n")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    report = demo.demo_report(tmp_path, {"grpo": 100.0}, 200.0)
    assert report["accuracy"].keys() == set(demo.MODELS)
    assert report["accuracy"]["vold"] == {"text": pytest.approx(0.3), "image": pytest.approx(0.3)}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "VOLD" in (tmp_path / "report.html").read_text()
    again = demo.demo_report(tmp_path, {"grpo": 0.1}, 1.0)
    assert again["seconds"] == {"grpo": 100.0}, "a kept phase keeps the seconds it took"
