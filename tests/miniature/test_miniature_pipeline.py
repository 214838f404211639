"""The demo and its starts: every phase's command line is valid, finished phases are kept, a failed one says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vold.config import load_config, schema
from vold.miniature import demo, methods, starts
from vold.miniature.make import MiniatureWorld
from vold.miniature.methods_figure import methods_figure
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.miniature.worlds import world_paths
from vold.report.style import PALETTE

SCHEMAS = {
    "traces": schema.TracesConfig,
    "sft": schema.SftConfig,
    "rl": schema.RlConfig,
    "eval": schema.EvalConfig,
}
WORLD = MiniatureWorld.at(Path("runs/miniature/seed0"))
DEMO_WORLD = world_paths(Path("runs"), demo.WORLD)


def all_phases() -> list[Phase]:
    planned = demo.phases(Path("runs/demo"), DEMO_WORLD)
    planned += [starts.start_phases(Path("runs/reproduce"), Path("runs/reproduce/seed1"), WORLD, seed=1)]
    planned += [[arm.phase(Path("runs"), WORLD, 1) for arm in methods.sweep(name)] for name in methods.methods()]
    return [phase for group in planned for phase in group]


@pytest.mark.parametrize("phase", all_phases(), ids=lambda phase: str(phase.run_dir))
def test_every_phase_has_a_valid_command(phase):
    config = load_config(SCHEMAS[phase.verb], CONFIGS / phase.config, [*phase.overrides, f"run_dir={phase.run_dir}"])
    assert phase.steps == getattr(config, "steps", 0), "the progress bar counts the steps that will be run"
    if phase.verb == "rl":
        assert config.objective.preset in phase.run_dir.name or "methods" in phase.run_dir.parts


def test_every_method_sees_as_many_prompts_and_responses():
    phases = [methods.Arm(name, 1e-4).phase(Path("runs"), WORLD, 1) for name in methods.methods()]
    configs = [load_config(schema.RlConfig, CONFIGS / phase.config, phase.overrides) for phase in phases]
    assert len({(c.steps, c.prompts_per_step, c.rollout.responses_per_prompt, c.seed) for c in configs}) == 1
    assert all(c.rollout.dynamic_sampling is None for c in configs) and len(configs) >= 15
    assert {c.optimizer.lr for c in configs} == {1e-4}


def test_a_method_is_a_row_of_means_and_one_that_failed_says_so(tmp_path, capsys):
    """The winner of the sweep is at its edge; the second method left nothing."""
    for seed in (0, 1):
        folder = tmp_path / "reproduce" / f"seed{seed}" / "eval_sft"
        folder.mkdir(parents=True)
        sets = {name: {"accuracy": accuracy} for name, accuracy in (("text", 0.4), ("image", 0.3))}
        (folder / "evaluation.json").write_text(json.dumps({"sets": sets}))
    rows = [{"arm": "vold", "rate": 6e-4, "seed": seed, "text": 0.6 + seed / 10, "image": 0.5} for seed in (0, 1)]
    steps = [{"seconds": 2.0 * n, "cpu_seconds": 1.0 * n, "seconds_teacher": 0.5 * n} for n in (1, 2, 3)]
    steps = [step | {"kl_tokens": 4000.0} for step in steps] + [{"seconds": 99.0}]  # the last one evaluates
    for seed in (0, 1):
        run_dir = methods.Arm("vold", 6e-4).run_dir(tmp_path, seed)
        run_dir.mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "methods" / "vold" / methods.RESULT).write_text(json.dumps({"rows": rows, "sweep": []}))
    methods.report(tmp_path, (0, 1), 1.0)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert table[3] == ["vold", "0.0006*", "2", "65.0 ± 5.0", "50.0 ± 0.0", "2.00", "4000", "25"]
    assert table[4] == ["sft", "–", "2", "40.0 ± 0.0", "30.0 ± 0.0", "–", "–", "–"]
    assert ["grpo", "failed", "0", *["–"] * 5] in table
    assert json.loads((tmp_path / "methods" / "report.json").read_text())["failed"][0] == "grpo"
    assert (tmp_path / "methods" / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_all_models_are_evaluated_on_the_same_held_out_problems():
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
    assert run_phases([done], parallel=2) == {}
    broken = Phase("eval", "eval.yaml", tmp_path / "broken", ("checkpoint=/nowhere",))
    with pytest.raises(RuntimeError, match=r"(?s)broken failed .*vold: "):
        run_phases([broken], parallel=1)


def test_the_demo_report_holds_every_model_and_set(tmp_path):
    for index, name in enumerate(demo.MODELS):
        run_dir = tmp_path / f"eval_{name}"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("verb: eval\n")
        numbers = {"accuracy": 0.1 * index, "stderr": 0.02, "n": 400}
        (run_dir / "evaluation.json").write_text(json.dumps({"sets": {"text": numbers, "image": numbers}}))
    for name in ("sft", *demo.ARMS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"verb: {name}\n")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    report = demo.demo_report(tmp_path, {"grpo": 100.0}, 200.0)
    assert report["accuracy"].keys() == set(demo.MODELS)
    assert report["accuracy"]["vold"] == {"text": pytest.approx(0.4), "image": pytest.approx(0.4)}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "VOLD" in (tmp_path / "report.html").read_text()
    again = demo.demo_report(tmp_path, {"grpo": 0.1}, 1.0)
    assert again["seconds"] == {"grpo": 100.0}, "a kept phase keeps the seconds it took"


def test_methods_are_lines_in_the_order_given_and_one_that_was_not_trained_has_no_cost():
    costs = {"cpu_seconds": 2.0, "teacher_share": 0.25}
    rows = [{"arm": "vold", "kind": "teacher", "text": 0.6 + s / 10, "image": 0.5, **costs} for s in (0, 1)]
    rows.append({"arm": "sft", "kind": "start", "text": 0.4, "image": 0.3})
    drawn = methods_figure(rows).decode()
    assert drawn.index(">VOLD<") < drawn.index(">SFT<") and ">its own average<" not in drawn
    assert drawn.count(f"fill: {PALETTE[0]}") == 1, "a bar for the one that was trained"
    with pytest.raises(ValueError, match="methods_figure: no row"):
        methods_figure([])
