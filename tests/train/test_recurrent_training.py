"""`vold rl` with a student whose layers have recurrent states, taught by a model of its own kind in the trainer."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from support.runs import same_tensors
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl

SMALL = ("steps=2", "prompts_per_step=2", "rollout.responses_per_prompt=3", "save_every=1", "evaluation.every=0")


@pytest.fixture(scope="module")
def run(load, tmp_path_factory, tiny_qwen3_5_dir, layout):
    """The teacher's weights are twice the student's."""
    root = tmp_path_factory.mktemp("recurrent")
    shutil.copytree(tiny_qwen3_5_dir, root / "teacher")
    file = root / "teacher" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    models = [f"student={tiny_qwen3_5_dir}", f"teacher={root / 'teacher'}", "objective.preset=opd"]
    config = load("rl", root / "rl", *models, *SMALL)
    train_rl(config)
    return config


def test_sampler_trainer_and_teacher_agree_and_it_learns(run, tiny_qwen3_5_dir):
    """The sampler reads each sequence alone, left-padded; trainer and teacher read packings with shared prompts."""
    first, second = read_rows(run.run_dir / "metrics.jsonl")
    assert first["kl_teacher"] > 1e-3 and first["grad_norm"] > 0
    assert max(first["mismatch_max"], second["mismatch_max"]) < 1e-4
    assert second["parity_max"] < 1e-4, "the sampler has the new weights"
    trained = run.run_dir / "model"
    assert not same_tensors(trained / "model.safetensors", tiny_qwen3_5_dir / "model.safetensors")
    AutoModelForImageTextToText.from_pretrained(trained)


def test_it_resumes_bit_for_bit(run, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(run.run_dir, whole)
    shutil.rmtree(run.run_dir / "checkpoints" / "step-000002")
    shutil.rmtree(run.run_dir / "model")
    (run.run_dir / "checkpoints" / "latest").write_text("step-000001\n")
    metrics = (run.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.run_dir / "metrics.jsonl").write_text(metrics[0])
    train_rl(run, resume=True)
    name = "checkpoints/step-000002/rank-00000.safetensors"
    assert same_tensors(whole / name, run.run_dir / name)
