"""Training what one wants: what `train` and optimizer.lr_groups choose is trained, and nothing else changes a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vision_ranks
from safetensors.torch import load_file

from support import ranks, tiny
from support.steps import OPTIMIZER, batch_of, make_groups, make_trainer
from vold.config.schema import AdapterConfig
from vold.data.packing import pack
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint, short_name
from vold.models.flops import backward_of, training_flops
from vold.models.student import build_student, check_rates, weight_groups
from vold.objectives import Objective
from vold.objectives.advantages import group_normalised
from vold.trainer.checkpoint import Checkpoints

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
CHOICES = {
    "a layer": (("layers.1",), lambda n: n.startswith("layers.1.")),
    "mlps and the last norm": (
        ("model.layers.*.mlp", "norm"),
        lambda n: (n.startswith("layers.") and ".mlp." in n) or n == "norm.weight",
    ),
    "head": (("lm_head.weight",), lambda n: n == "lm_head.weight"),
    "embedding": (("embed_tokens",), lambda n: n.startswith("embed_tokens")),
    "merger": (("model.visual.merger",), lambda n: n.startswith("visual.merger.")),
    "tower": (("visual",), lambda n: n.startswith("visual.")),
    "last block and a layer": (
        ("visual.blocks.1", "layers.0.self_attn.*_proj*"),
        lambda n: n.startswith("visual.blocks.1.") or (n.startswith("layers.0.self_attn.") and "_proj" in n),
    ),
    "all": (("language_model", "visual"), lambda n: True),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    return {family: tiny.save(vision_ranks.reference(family), tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_not_named_keeps_every_bit_and_has_no_state(students, layout, choice, tmp_path):
    student = students["qwen2_5_vl"]
    patterns, is_trained = CHOICES[choice]
    trainer = vision_ranks.open_trainer(student, layout, train=patterns)
    batch = pack(vision_ranks.make_samples(), max_tokens=60, encode=vision_ranks.Pictures(trainer.chunks[0].arch))
    for _ in range(3):
        assert trainer.step(batch).metrics["skipped"] == 0.0
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.parameters.values()}
    export_checkpoint(student, tmp_path / "model", trainer.weights())
    before, after = (load_file(path / "model.safetensors") for path in (student, tmp_path / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_trained(short_name(name))}
    Checkpoints(tmp_path, layout).save(trainer, 3)
    (file,) = tmp_path.glob("checkpoints/step-000003/rank-*.safetensors")
    saved = {name.partition("/")[2] for name in load_file(file) if not name.startswith("random/")}
    assert saved == {short_name(name) for name in changed}, "a checkpoint holds what is trained alone"


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_tower_has_transformers_gradients(students, layout, family, recompute):
    recomputing = replace(layout, recompute=recompute)
    trainer = vision_ranks.open_trainer(students[family], recomputing, train=vision_ranks.TOWER)
    assert trainer.vision is None
    vision_ranks.check(trainer, family, takes_tower=True)


def test_a_trained_tower_on_two_ranks(students, tmp_path):
    """Every layout has transformers' gradients, and continues from the checkpoint of the layout before it."""
    ranks.run(2, vision_ranks.tower_rank, students, tmp_path, logs=tmp_path / "logs")


@pytest.mark.parametrize("patterns", [("layers.1",), ("layers.1.mlp",), ("norm",)])
def test_frozen_layers_below_change_no_gradient(patterns, layout, tmp_path):
    """The backward pass ends at the lowest trained layer; recomputation, which needs an input with a gradient, does not
    lose one silently."""
    student = tiny.save(tiny.qwen3(tied=False), tmp_path)
    samples = Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))
    found = {}
    for name, train in (("none", None), ("none", patterns), ("selective", patterns), ("full", patterns)):
        trainer = make_trainer(student, replace(layout, recompute=name), train=train)
        trainer.accumulate_gradients(batch_of(samples))
        found[name, train] = {name: p.main_grad.clone() for name, p in trainer.parameters.items()}
    everything = found.pop(("none", None))
    for gradients in found.values():
        assert gradients and all(gradient.any() for gradient in gradients.values())
        assert all(torch.equal(everything[name], gradient) for name, gradient in gradients.items())


def test_groups_have_their_own_rates(students, layout):
    """One step of AdamW from zero moments moves a weight by its rate."""
    rates = {"visual.merger": 1e-5, "visual": 2e-4, "layers.*.mlp": 3e-3}
    numbers = dict(lr_groups=rates, weight_decay=0.0, clip_grad=1e9, eps=1e-20, schedule="cosine", min_lr_ratio=0.1)
    trainer = vision_ranks.open_trainer(students["qwen3_vl"], layout, train=vision_ranks.TOWER, **numbers)
    before = {name: tensor.clone() for name, tensor in trainer.weights()}
    batch = pack(vision_ranks.make_samples(), max_tokens=60, encode=vision_ranks.Pictures(trainer.chunks[0].arch))
    share = trainer.step(batch).metrics["lr"] / OPTIMIZER.lr  # of the peak, by the schedule
    assert 0.1 < share < 1.0
    for name, tensor in trainer.weights():
        short = short_name(name)
        rate = 1e-5 if short.startswith("visual.merger") else 2e-4 if short.startswith("visual") else OPTIMIZER.lr
        rate = 3e-3 if short.startswith("layers.") and ".mlp." in short else rate
        moved = float((tensor - before[name]).abs().max())
        assert moved == pytest.approx(rate * share, rel=0.05), name


@pytest.mark.parametrize(
    "train, says",
    [
        (("layers.9",), "train: 'layers.9' is no weight"),
        (("vision",), "train: 'vision' is no weight"),
        (("layers.0.self_attn.q_proj",), "without layers.0.self_attn.k_proj"),
        (("layers.*.mlp.up_proj",), "without layers.0.mlp.gate_proj"),
    ],
)
def test_a_pattern_that_cannot_be_is_one_line(students, layout, train, says):
    with pytest.raises(ValueError, match=says):
        build_student(Architecture.from_pretrained(students["qwen2_5_vl"]), layout, torch.float32, train=train)


def test_rates_without_a_trained_weight_are_refused(students):
    arch = Architecture.from_pretrained(students["qwen2_5_vl"])
    check_rates(arch, {"layers.*.lora_B": 1.0}, None, AdapterConfig(), False)
    check_rates(arch, {"visual.merger": 1.0}, None, None, True)
    with pytest.raises(ValueError, match=r"lr_groups: 'visual' takes no weight that is trained"):
        check_rates(arch, {"visual": 1.0}, None, None, False)


def test_the_head_of_a_tied_model_is_its_embedding():
    arch = Architecture.from_config(tiny.qwen3(tied=True).config)
    names = {name for group in weight_groups(arch) for name in group}
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names


def test_flops_of_the_backward_pass():
    """By hand: 2 per weight and token forward, 2 for each gradient that passes a layer, 2 for each trained weight's."""
    arch = Architecture.from_config(tiny.qwen3(tied=False).config)
    samples = Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0]]))
    (micro,) = batch_of(samples).micro_batches
    tokens = sum(queries for queries, _ in micro.tokens.segments)
    attention = sum(2 * 2 * 4 * 32 * q * (2 * k - q) for q, k in micro.tokens.segments)  # forward, two layers
    mlp, head = 3 * 64 * 96, 128 * 64
    layer = 64 * (4 + 2 + 2) * 32 + 4 * 32 * 64 + mlp
    forward = 2 * tokens * (2 * layer + head) + attention

    def flops(trained: str) -> float:
        backward = backward_of(arch, lambda name: name.startswith(trained), through_embedding=False)
        return training_flops(arch, micro.tokens, backward)

    assert flops("") == training_flops(arch, micro.tokens) == 3 * forward
    assert flops("layers.1.mlp") == forward + 2 * tokens * (layer + head + mlp) + attention  # 2 · half of the layers
    assert flops("layers.0.mlp") == forward + 2 * tokens * (2 * layer + head + mlp) + 2 * attention
    assert flops("lm_head") == forward + 2 * tokens * (head + head)
