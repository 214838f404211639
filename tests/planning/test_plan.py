"""`vold plan`: the shipped 3B configs on published GPUs, from config.json alone; refusals, proposals, time bounds."""

from __future__ import annotations

import re
from pathlib import Path

import dry_run
import pytest

from vold.config import load_config, schema
from vold.models.flops import language_model_parameters
from vold.planning.step_sizes import StepSizes
from vold.planning.step_time import phase_work, read_measured_rates
from vold.planning.tunable_settings import levels_by_cost, tunable_settings, with_overrides

CONFIGS = Path(__file__).parents[2] / "configs" / "qwen2.5-vl-3b"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    """Overrides that point a config at directories with nothing but the real models' config.json."""
    folder = tmp_path_factory.mktemp("published")
    student = dry_run.student()
    # the published tower of the 3B model: the class's own numbers are those of a larger one
    for key, value in dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16).items():
        setattr(student.vision_config, key, value)
    student.vision_config.out_hidden_size = 2048
    student.save_pretrained(folder / "student")
    dry_run.teacher().save_pretrained(folder / "teacher")
    return [f"student={folder / 'student'}", f"teacher={folder / 'teacher'}"]


@pytest.fixture
def plan(launch, monkeypatch):
    """plan(config's name, *arguments): `vold plan rl` on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "160")
    return lambda name, *arguments: launch(1, "-m", "vold", "plan", "rl", CONFIGS / name, *arguments)


def test_the_papers_stage_2_fits_four_a100s_of_80_gb(plan, checkpoints):
    run = plan("vold.yaml", *checkpoints, "--gpu", "a100-80g", "--processes", "4")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == "" and "✗" not in run.stdout
    assert "5.75" in run.stdout and "15.26" in run.stdout, "2 bytes of 3,085,938,688 and of 8,190,735,360 parameters"
    assert "not measured" in run.stdout and "a bound, not a forecast" in run.stdout
    last = run.stdout.splitlines()[-1]
    assert last.startswith("✓ fits: ") and re.search(r"60 steps: [\d.]+ hours at least$", last)


def test_the_recipe_for_one_gpu_fits_80_gb_and_with_a_smaller_teacher_24(plan, checkpoints, tmp_path):
    run = plan("one-gpu.yaml", *checkpoints, "--gpu", "a100-80g")
    assert run.returncode == 0 and "✗" not in run.stdout, run.stdout + run.stderr
    smaller = dry_run.teacher()
    smaller.hidden_size, smaller.intermediate_size, smaller.tie_word_embeddings = 2560, 9728, True  # of Qwen3-4B
    smaller.save_pretrained(tmp_path / "teacher")
    overrides = [f"teacher={tmp_path / 'teacher'}", "rollout.vllm.kv_cache_gib=4", "microbatch_tokens=9216"]
    run = plan("one-gpu.yaml", checkpoints[0], *overrides, "--gpu", "rtx4090-24g")
    assert run.returncode == 0 and "✗" not in run.stdout, run.stdout + run.stderr


def test_what_does_not_fit_is_refused_in_one_line_with_settings_that_do(plan, checkpoints):
    overrides = ["objective.preset=grpo", "parallel.distributed_optimizer=false", "evaluation.every=0"]
    run = plan("vold.yaml", *checkpoints, *overrides, "--gpu", "a100-80g", "--processes", "4")
    assert run.returncode == 2 and "✗" in run.stdout
    (line,) = run.stderr.splitlines()
    assert line.startswith("vold: phase rollout needs ") and " GiB on every rank and a100-80g has 72.0" in line
    proposed = [word for word in line.split("; ")[1].split() if "=" in word]
    assert proposed == ["parallel.distributed_optimizer=true"], (
        "the cheapest that saves enough: no other setting changes"
    )


def test_an_impossible_layout_is_one_line(plan, checkpoints):
    run = plan("vold.yaml", *checkpoints, "parallel.tp=3", "--gpu", "h200", "--processes", "4")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "tp=3 x pp=1 = 3 does not divide the world of 4 processes" in run.stderr


@pytest.fixture
def sizes(checkpoints) -> StepSizes:
    return StepSizes(load_config(schema.RlConfig, CONFIGS / "vold.yaml", checkpoints), 4)


def test_parameters_are_those_of_the_published_models(sizes):
    assert language_model_parameters(sizes.student) == 3_085_938_688
    assert language_model_parameters(sizes.teacher) == 8_190_735_360


def test_work_is_two_flop_a_parameter_and_token_and_divided_over_ranks(sizes):
    work, tokens = phase_work(sizes), sizes.tokens_per_replica
    assert tokens == 64 * (1024 + 5 * 7168)
    matmuls = 2 * language_model_parameters(sizes.student) * tokens
    assert 1.0 < work["student_forward"].flop / matmuls < 1.35, "attention comes on top"
    halved = StepSizes(with_overrides(sizes.config, {"parallel.tp": 2}), 8)
    assert phase_work(halved)["teacher"].flop == pytest.approx(work["teacher"].flop / 2)
    recomputed = StepSizes(with_overrides(sizes.config, {"parallel.recompute": "full"}), 4)
    assert phase_work(recomputed)["student_backward"].flop == pytest.approx(3 * work["student_forward"].flop)
    shorter = StepSizes(sizes.config, 4, mean_response_tokens=1024)
    assert phase_work(shorter)["rollout"].moved < work["rollout"].moved / 6


def test_settings_are_tried_from_the_cheapest_on(sizes):
    settings = tunable_settings(sizes)
    costs = [
        sum(setting.cost * level for setting, level in zip(settings, levels, strict=True))
        for levels in levels_by_cost(settings)
    ]
    assert costs == sorted(costs) and costs[0] == 0 and len(costs) > 100
    changed = with_overrides(sizes.config, {"evaluation.sampling.sequences_per_call": 8})
    assert changed.evaluation.sampling.sequences_per_call == 8


def test_rates_are_read_from_a_profiles_table(tmp_path):
    (tmp_path / "profile").mkdir()
    header = "rank,phase,seconds,share,tokens_per_second,mfu,memory_gib\n"
    rows = "0,rollout,2,.5,1000,,1\n0,optimizer,1,.1,,,1\n1,rollout,2,.5,1000,,1\n"
    (tmp_path / "profile" / "phases.csv").write_text(header + rows)
    assert read_measured_rates(tmp_path) == {"rollout": 500.0}, "of one of the two processes"
    with pytest.raises(ValueError, match="run `vold profile` on this machine first"):
        read_measured_rates(tmp_path / "elsewhere")
