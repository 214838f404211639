"""Training on text and images: transformers' log-probs and gradients at every layout, and what is frozen stays so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vision_ranks
from safetensors.torch import load_file

from support import ranks, tiny
from vold.data.packing import pack
from vold.models.checkpoint_dir import export_checkpoint, short_name

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def student(family, tmp_path_factory):
    return tiny.save(vision_ranks.reference(family), tmp_path_factory.mktemp(family))


def test_logprobs_and_gradients_equal_transformers(family, student, layout):
    vision_ranks.check(vision_ranks.open_trainer(student, layout, train_merger=True), family)


def test_recomputed_layers_give_the_same_gradients(family, student, layout):
    again = vision_ranks.open_trainer(student, replace(layout, recompute="full"), train_merger=True)
    vision_ranks.check(again, family)


@pytest.mark.parametrize("train_merger", [True, False])
def test_bfloat16_takes_the_same_step(student, layout, train_merger):
    reports = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = vision_ranks.open_trainer(student, layout, train_merger=train_merger, dtype=dtype)
        batch = pack(vision_ranks.make_samples(), max_tokens=60, encode=vision_ranks.Pictures(trainer.chunks[0].arch))
        reports.append(trainer.step(batch).metrics)
    assert reports[1]["nll"] == pytest.approx(reports[0]["nll"], rel=0.02)
    assert reports[1]["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=0.05)


def test_a_teacher_reads_its_own_prompts(student, layout):
    vision_ranks.check_teacher(vision_ranks.open_trainer(student, layout, train_merger=False), student, layout)


def test_every_layout_of_two_ranks_equals_transformers(tmp_path):
    """And continues from a checkpoint of the layout before it; a teacher scores there what the student itself does."""
    students = {family: tiny.save(vision_ranks.reference(family), tmp_path / family) for family in FAMILIES}
    (tmp_path / "runs").mkdir()
    ranks.run(2, vision_ranks.rank, students, tmp_path / "runs", logs=tmp_path / "logs")


@pytest.mark.parametrize("train_merger", [True, False])
def test_what_is_frozen_keeps_every_bit_and_everything_else_moves(student, layout, tmp_path, train_merger):
    trainer = vision_ranks.open_trainer(student, layout, train_merger=train_merger)
    batch = pack(vision_ranks.make_samples(), max_tokens=60, encode=vision_ranks.Pictures(trainer.chunks[0].arch))
    tower = {name: tensor.clone() for name, tensor in trainer.vision.state_dict().items()}
    for _ in range(3):
        assert trainer.step(batch).metrics["skipped"] == 0.0

    assert all(torch.equal(tower[name], tensor) for name, tensor in trainer.vision.state_dict().items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.parameters.values()}
    assert not optimised & {id(p) for p in trainer.vision.parameters()}

    trained = {short_name(name) for name, _ in trainer.weights()}
    assert any("visual" in name for name in trained) == train_merger
    export_checkpoint(student, tmp_path / "model", trainer.weights())
    before, after = (load_file(path / "model.safetensors") for path in (student, tmp_path / "model"))
    for name in before:
        assert torch.equal(before[name], after[name]) == (short_name(name) not in trained), name
