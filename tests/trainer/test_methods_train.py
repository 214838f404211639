"""Methods in the trainer: several updates on one step's rollouts, ratios by formula, and a preset of the test's own."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_step import MIXED, as_megatron
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from support.steps import (
    LONGEST,
    VOCAB_SIZE,
    assign_token_weights,
    batch_of,
    gradients,
    make_groups,
    make_teacher,
    make_trainer,
    relative,
)
from vold.config.schema import ObjectiveConfig
from vold.models.checkpoint_dir import export_checkpoint
from vold.objectives import PRESETS, Objective, build_objective, presets, split_minibatches
from vold.objectives.normalisers import constant

ROOT = Path(__file__).parents[2]
GROUPS = [*MIXED, [1.0, 0.0, 1.0]]
NUMBERS = dict(lr=2e-2, clip_grad=1e9)  # far enough that ratios leave their bounds; gradients as they are


def read(model, sample):
    """Log-prob of each response token, entropy of each distribution."""
    logp_TV = distribution(model, sample)
    logp_T = logp_TV.gather(1, torch.tensor(sample.response_ids.tolist())[:, None])[:, 0]
    return logp_T, -(logp_TV.exp() * logp_TV).sum(-1)


def bounds(name, objective, logp_old):
    if name != "dcpo":
        return 1 - objective.clip_eps_low, 1 + objective.clip_eps_high
    q = logp_old.exp()
    return 0.5 + 0.5 * (1 - 0.64 / q).clamp(min=0).sqrt(), 0.5 + 0.5 * (1 + 0.8 / q).sqrt()


@pytest.mark.parametrize("name", ["vold", "vold-gspo", "dcpo"])
def test_the_second_update_equals_the_formula_on_materialised_logits(name, tiny_student_dir, layout, tmp_path):
    """Gradients of the second of two updates, against plain torch on the weights that the first one left, with the
    ratios to the weights before it; entropy bonus and clamp included. The teacher is the student before it moved."""
    objective = replace(PRESETS[name], max_response_tokens=LONGEST, entropy_bonus=0.02, kl_clamp=0.05)
    teacher = make_teacher(tiny_student_dir, layout)
    samples = objective.assign_token_weights(make_groups(GROUPS), minibatches=2)
    parts = split_minibatches(samples)
    first, second = (teacher.score(batch_of(part, max_tokens=60)) for part in parts)
    trainer = make_trainer(tiny_student_dir, layout, objective=objective, **NUMBERS)
    metrics = trainer.step(first, second).metrics
    found = {key: parameter.main_grad.clone() for key, parameter in trainer.parameters.items()}
    once = make_trainer(tiny_student_dir, layout, objective=objective, **NUMBERS)
    once.step(first)
    export_checkpoint(tiny_student_dir, tmp_path / "moved", once.weights())

    before, moved = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        for path in (tiny_student_dir, tmp_path / "moved")
    )
    clipped = 0
    for sample in (s for s in parts[1] if s.pg_weight or s.kl_weight):
        logp_old = read(before, sample)[0].detach()
        logp, entropy = read(moved, sample)
        log_ratio = (logp - logp_old).mean().expand_as(logp) if name == "vold-gspo" else logp - logp_old
        ratio, (low, high) = log_ratio.exp(), bounds(name, objective, logp_old)
        unclipped, bounded = ratio * sample.advantage, ratio.clamp(low, high) * sample.advantage
        clipped += int((bounded < unclipped).sum())
        pull = torch.nn.functional.huber_loss(logp, logp_old, delta=0.05, reduction="none")
        loss = -sample.pg_weight * (torch.minimum(unclipped, bounded) + 0.02 * entropy) + sample.kl_weight * pull
        loss.sum().backward()
    assert clipped > 0, "a clip range that nothing leaves proves nothing"
    assert relative(found, as_megatron(moved, trainer)) < 1e-4
    tokens = sum(len(s.response_ids) for s in samples)
    assert metrics["gradient_tokens"] == tokens
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] == pytest.approx(clipped / tokens)
    if objective.needs_teacher:
        assert 0 < metrics["kl_clamped"] < 1


@pytest.mark.parametrize("keys", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "top_k": 5}], ids=["full", "jsd"])
def test_a_full_divergence_equals_the_formula_on_materialised_logits(
    keys, tiny_student_dir, tiny_teacher_dir, layout, tmp_path
):
    """With GRPO beside it, in the second of two updates: divergences count as often as the truncated ratio says."""
    objective = build_objective(ObjectiveConfig(preset="vold", beta=0.5, **keys), LONGEST)
    assert objective.divergence.ratio_cap == 2
    objective = replace(objective, divergence=replace(objective.divergence, ratio_cap=1.02))
    teacher = make_teacher(tiny_teacher_dir, layout, full_distributions=True)
    parts = split_minibatches(objective.assign_token_weights(make_groups(GROUPS), minibatches=2))
    batches = [teacher.score(batch_of(part, max_tokens=60)) for part in parts]
    trainer = make_trainer(tiny_student_dir, layout, objective=objective, **NUMBERS)
    metrics = trainer.step(*batches).metrics
    found = {key: parameter.main_grad.clone() for key, parameter in trainer.parameters.items()}
    once = make_trainer(tiny_student_dir, layout, objective=objective, **NUMBERS)
    once.step(batches[0])
    export_checkpoint(tiny_student_dir, tmp_path / "moved", once.weights())

    before, moved, above = (
        kind.from_pretrained(path, dtype=torch.float32)
        for kind, path in (
            (AutoModelForImageTextToText, tiny_student_dir),
            (AutoModelForImageTextToText, tmp_path / "moved"),
            (AutoModelForCausalLM, tiny_teacher_dir),
        )
    )
    truncated = 0
    for sample in (s for s in parts[1] if s.pg_weight or s.kl_weight):
        logp_old, logp = read(before, sample)[0].detach(), read(moved, sample)[0]
        ratio = (logp - logp_old).exp()
        clipped = ratio.clamp(0.8, 1.3) * sample.advantage
        loss = -(sample.pg_weight * torch.minimum(ratio * sample.advantage, clipped)).sum()
        if sample.kl_weight:
            student_TV, teacher_TV = distribution(moved, sample), distribution(above, sample).detach()
            weight_T = sample.kl_weight * ratio.detach().clamp(max=1.02)
            truncated += int((ratio > 1.02).sum())
            loss = loss + (weight_T * divergence(student_TV, teacher_TV, keys.get("top_k"))).sum()
        loss.backward()
    assert truncated > 0, "a cap that nothing reaches proves nothing"
    assert relative(found, as_megatron(moved, trainer)) < 1e-4
    assert metrics["kl_teacher"] > 0.01 and metrics["entropy"] > 0.1 and metrics["kl_loss"] > 0


def test_metrics_of_sampled_tokens_are_absent_without_a_policy_gradient(tiny_student_dir, tiny_teacher_dir, layout):
    """Whole distributions alone: no sampled token's log-prob is known, and an entropy of 0 would mean a collapse."""
    objective = build_objective(ObjectiveConfig(preset="opd", divergence="reverse_kl"), LONGEST)
    batch = batch_of(objective.assign_token_weights(make_groups(GROUPS)), max_tokens=60)
    trainer = make_trainer(tiny_student_dir, layout, objective=objective, **NUMBERS)
    metrics = trainer.step(make_teacher(tiny_teacher_dir, layout, full_distributions=True).score(batch)).metrics
    assert metrics["kl_teacher"] > 0.01 and metrics["gradient_tokens"] > 0
    assert not {"nll", "entropy", "clip_fraction_low", "clip_fraction_high"} & metrics.keys()


def distribution(model, sample):
    """Log-probs [T, V] at the response's tokens."""
    ids = torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()]])
    return model(ids).logits[0, len(sample.prompt.token_ids) - 1 : -1, :VOCAB_SIZE].log_softmax(-1)


def divergence(student_TV, teacher_TV, top_k):
    """KL(S || T), or the symmetric Jensen-Shannon divergence over the student's top and one bucket for the rest."""
    if top_k is None:
        return (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)
    top = student_TV.topk(top_k).indices
    student_TV, teacher_TV = (
        torch.cat([x.gather(1, top), (1 - x.gather(1, top).exp().sum(-1, keepdim=True)).log()], dim=1)
        for x in (student_TV, teacher_TV)
    )
    mixture = (student_TV.exp() + teacher_TV.exp()).log() - math.log(2)
    return 0.5 * sum((x.exp() * (x - mixture)).sum(-1) for x in (student_TV, teacher_TV))


def test_at_one_update_a_step_every_ratio_is_exactly_one(tiny_student_dir, layout):
    """So a coupled ratio, too, is the plain policy gradient there."""
    batch = batch_of(assign_token_weights("gspo", make_groups(GROUPS)))
    trainers = [make_trainer(tiny_student_dir, layout, objective=PRESETS[name]) for name in ("gspo", "dcpo", "grpo")]
    coupled, adaptive, plain = (gradients(trainer, batch) for trainer in trainers)
    assert relative(coupled, plain) < 1e-6 and all(torch.equal(adaptive[name], plain[name]) for name in plain)
    assert max(float(g.abs().max()) for g in plain.values()) > 0


def test_minibatches_advance_the_schedule_once_and_adam_each_time(tiny_student_dir, layout):
    trainer = make_trainer(tiny_student_dir, layout, steps=4, warmup_steps=2)
    parts = split_minibatches(PRESETS["grpo"].assign_token_weights(make_groups(GROUPS), minibatches=3))
    assert trainer.step(*(batch_of(part) for part in parts)).metrics["lr"] == pytest.approx(5e-4)
    # the second part, whose rewards are all equal, has no gradient
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {2}


def test_a_new_method_is_a_preset_and_nothing_else(tiny_student_dir, layout, monkeypatch):
    """Made up here: advantages by rank, the teacher on the worst response, constant weights. One line in PRESETS, and
    config, weights and trainer take it."""

    def by_rank(rewards_G, _earlier=()):
        order = sorted(range(len(rewards_G)), key=rewards_G.__getitem__)
        return [order.index(response) - (len(rewards_G) - 1) / 2 for response in range(len(rewards_G))]

    def worst(right_G):
        return [float(right == min(right_G)) for right in right_G]

    made_up = Objective(by_rank, worst, normaliser=constant, beta=0.1)
    monkeypatch.setitem(presets.PRESETS, "made-up", made_up)
    objective = build_objective(ObjectiveConfig(preset="made-up", clip_eps_high=0.5), LONGEST)
    assert objective == replace(made_up, clip_eps_high=0.5, max_response_tokens=LONGEST)
    trainer, teacher = (
        make_trainer(tiny_student_dir, layout, objective=objective),
        make_teacher(tiny_student_dir, layout),
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    samples = objective.assign_token_weights(make_groups([[0.0, 0.5, 1.0], [0.3, 0.2, 0.1]]))
    assert [s.advantage for s in samples] == [-1.0, 0.0, 1.0, 1.0, 0.0, -1.0]
    assert [s.kl_weight > 0 for s in samples] == [True, False, False, True, True, True]  # by answers, not rewards
    metrics = trainer.step(teacher.score(batch_of(samples))).metrics
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    assert relative(dict(trainer.parameters), before) > 0


def test_only_objectives_names_a_method():
    """Except config (defaults), the miniature (its arms) and the report (colours); `vold` also names the package."""
    names = "|".join(map(re.escape, PRESETS.keys() - {"vold"}))
    for path in ROOT.glob("vold/**/*.py"):
        if path.relative_to(ROOT / "vold").parts[0] not in ("objectives", "config", "miniature", "report"):
            assert not re.findall(rf"""["']({names})["']""", path.read_text()), path
