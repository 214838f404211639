"""The stages with `engine: vllm` inside the training process: the same answers and log-probs as with transformers.

Run by `make test-vllm`: real vLLM has an environment of its own.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from vold.evaluation.evaluator import evaluate
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl
from vold.train.teacher_traces import generate_traces

pytestmark = pytest.mark.vllm

VLLM = "{kv_cache_gib: 0.25, max_model_len: 256, enforce_eager: true}"
ENGINE = ["engine=vllm", f"vllm={VLLM}"]
ROLLOUT = [f"rollout.{override}" for override in ENGINE]


# What is drawn is the most probable token: vLLM's random numbers are not torch's.
STEPS = ["steps=3", "evaluation.every=3", "rollout.temperature=0.8", "rollout.top_k=1", "samples_per_step=12"]


@pytest.fixture(scope="module")
def rl_runs(world, tmp_path_factory, layout):
    """Three steps of VOLD with rollouts, evaluation and parity probe by vLLM, and by transformers."""
    from support.stage_world import CONFIGS
    from vold.config import load_config, schema

    configs = []
    for engine in (ROLLOUT, []):
        run_dir = tmp_path_factory.mktemp("runs") / "rl"
        overrides = [*world.overrides("rl", run_dir), *engine, *STEPS]
        configs.append(load_config(schema.RlConfig, CONFIGS / "rl.yaml", overrides))
        train_rl(configs[-1])
    return configs


@pytest.fixture
def rl_run(rl_runs):
    return rl_runs[0]


def test_both_engines_train_alike(rl_runs):
    """The same responses and rewards at every step, word for word, and so the same updates."""
    ours, theirs = (read_rows(config.run_dir / "samples.jsonl") for config in rl_runs)
    assert len(ours) == 3 * 12
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.pop("mean_kl") == pytest.approx(yours.pop("mean_kl"), rel=0, abs=1e-4)
        for name in ("logp", "logp_teacher"):  # to 3 decimals
            assert mine.pop(name, []) == pytest.approx(yours.pop(name, []), rel=0, abs=2e-3)
        assert mine == yours
    ours, theirs = (read_rows(config.run_dir / "metrics.jsonl") for config in rl_runs)
    for mine, yours in zip(ours, theirs, strict=True):
        for name in ("reward", "response_length", "kl_teacher", "grad_norm"):
            assert mine[name] == pytest.approx(yours[name], rel=1e-4)


def test_rollouts_have_the_trainers_logprobs_at_every_step(rl_run):
    """Each step samples with the weights of the step before: a missed or stale weight would show here."""
    rows = read_rows(rl_run.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["response_tokens"] > 0 and row["kl_teacher"] > 0 and row["grad_norm"] > 0
        assert row["mismatch_max"] < 1e-4 and row["parity_max"] < 1e-4


def test_a_teacher_in_vllm_trains_alike(rl_runs, world, tmp_path, layout):
    """Scored for each group as it is done, by an engine in the process: the same updates."""
    from support.stage_world import CONFIGS
    from vold.config import load_config, schema

    teacher = ["teacher_engine=vllm", f"teacher_vllm={VLLM}"]
    overrides = [*world.overrides("rl", tmp_path / "rl"), *ROLLOUT, *STEPS, *teacher]
    train_rl(load_config(schema.RlConfig, CONFIGS / "rl.yaml", overrides))
    ours, theirs = (read_rows(run_dir / "metrics.jsonl") for run_dir in (tmp_path / "rl", rl_runs[0].run_dir))
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["kl_teacher"] > 0
        for name in ("reward", "response_length", "kl_teacher", "grad_norm"):
            assert mine[name] == pytest.approx(yours[name], rel=1e-4)


def test_both_engines_answer_the_trained_model_alike(rl_run, load, tmp_path, layout):
    """Text and images, word for word; and as the run itself did at its last step."""
    answers = {}
    for name, overrides in {"transformers": [], "vllm": ENGINE}.items():
        config = load("eval", tmp_path / name, f"checkpoint={rl_run.run_dir / 'model'}", *overrides)
        evaluate(config)
        answers[name] = read_rows(config.run_dir / "samples.jsonl")
        accuracy = json.loads((config.run_dir / "evaluation.json").read_text())["sets"]
    assert answers["vllm"] == answers["transformers"] and len(answers["vllm"]) == 12
    last = read_rows(rl_run.run_dir / "metrics.jsonl")[-1]
    assert {name: last[f"accuracy_{name}"] for name in accuracy} == {n: a["accuracy"] for n, a in accuracy.items()}


def test_traces(load, tmp_path, layout):
    overrides = ["sampling.max_new_tokens=6", "prompts_per_shard=5", "max_tokens=64", *ENGINE]
    config = load("traces", tmp_path / "traces", *overrides)
    generate_traces(config)
    assert json.loads((config.run_dir / "traces" / "card.json").read_text())["asked"] == 12
