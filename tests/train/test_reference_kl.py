"""A frozen reference: its gradient beside transformers' own, a run with it, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import tiny
from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import AdapterConfig, ObjectiveConfig
from vold.objectives import build_objective
from vold.objectives.divergences import REFERENCE_DIVERGENCES
from vold.run.run_dir import read_rows
from vold.teacher import BaseTeacher, Reference, Teacher
from vold.train.rl import train_rl

NUMBERS = dict(dtype=torch.float32, vocab_size=40)
KINDS = list(REFERENCE_DIVERGENCES)


def references(kind: str, model: Teacher) -> Reference:
    return Reference(model, REFERENCE_DIVERGENCES[kind])


def expected_terms(model, other, samples, kind: str) -> tuple[torch.Tensor, int]:
    """(sum over tokens of weight x term, tokens), by transformers, sample by sample, on the ids below the bound."""
    total, tokens = torch.zeros(()), 0
    for sample in samples:
        ids = torch.tensor([*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()])[None]
        first, length = len(sample.prompt.token_ids) - 1, len(sample.response_ids)
        logp, reference = (m(ids).logits[0, first : first + length, :40].log_softmax(-1) for m in (model, other))
        reference = reference.detach()
        if kind == "k3":
            target = torch.tensor(sample.response_ids.tolist())[:, None]
            x = (reference - logp).gather(1, target)[:, 0]
            term = x.exp() - 1 - x
        elif kind == "reverse_kl":
            term = (logp.exp() * (logp - reference)).sum(-1)
        elif kind == "forward_kl":
            term = (reference.exp() * (reference - logp)).sum(-1)
        else:
            mixture = ((logp.exp() + reference.exp()) / 2).log()
            sides = [(x.exp() * (x - mixture)).sum(-1) for x in (logp, reference)]
            term = (sides[0] + sides[1]) / 2
        total, tokens = total + (sample.reference_weight * term).sum(), tokens + length
    return total, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_transformers_own(kind, layout, tmp_path):
    student = tiny.save(tiny.qwen3(tied=False), tmp_path / "student")
    reference = tiny.save(tiny.perturbed(type(tiny.qwen3()), tiny.qwen3(tied=False).config, seed=5), tmp_path / "other")
    trainer = make_trainer(student, layout, terms=("reference",))
    samples = [
        replace(s, pg_weight=0.0, kl_weight=0.0, reference_weight=(1 + i) / 50)
        for i, s in enumerate(assign_token_weights("grpo", make_groups([[1.0, 0.0], [0.0, 0.0]])))
    ]
    scored = references(kind, Teacher(reference, layout, full_distributions=kind != "k3", **NUMBERS)).score(
        batch_of(samples)
    )
    stats = trainer.accumulate_gradients(scored.to(layout.device))
    for parameter in trainer.parameters.values():
        parameter.grad = parameter.main_grad
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, reference))
    total, tokens = expected_terms(model, other, samples, kind)
    total.backward()
    (of_reference,) = (s.terms_3["reference"] for s in stats)
    assert of_reference[1] == tokens and float(of_reference[2]) == pytest.approx(float(total.detach()), rel=1e-4)
    error, name = tiny.worst_gradient_error(trainer.chunks[0], model)
    assert error < 1e-3, name


@pytest.mark.parametrize("kind", ["k3", "reverse_kl"])
def test_beside_a_teacher_the_gradients_add_up(kind, tiny_student_dir, tiny_teacher_dir, layout):
    """VOLD's terms and the reference's, each alone and both together; the base of a VL student reads as the student."""
    trainer = make_trainer(tiny_student_dir, layout, terms=("reference",))
    teacher = Teacher(tiny_teacher_dir, layout, **NUMBERS)
    reference = references(kind, Teacher(tiny_student_dir, layout, full_distributions=kind != "k3", **NUMBERS))
    trainer.step(teacher.score(batch_of(assign_token_weights("vold", make_groups([[1.0, 0.0], [0.0, 0.0]])))))
    vold = assign_token_weights("vold", make_groups([[1.0, 0.0], [0.0, 1.0]]))
    both = [replace(s, reference_weight=0.02) for s in vold]
    alone = [replace(s, pg_weight=0.0, kl_weight=0.0) for s in both]
    of_vold, of_both, of_reference = (
        gradients(trainer, teacher.score(reference.score(batch_of(samples)))) for samples in (vold, both, alone)
    )
    assert max(float(g.abs().max()) for g in of_reference.values()) > 1e-6, "the student has left the reference"
    assert relative({n: of_vold[n] + of_reference[n] for n in of_vold}, of_both) < 2e-4


@pytest.mark.parametrize("kind", ["k3", "jsd"])
def test_behind_adapters_the_base_is_free_and_the_same(kind, tiny_student_dir, layout):
    trainer = make_trainer(tiny_student_dir, layout, adapter=AdapterConfig(rank=2), lr=0.05)
    samples = [replace(s, reference_weight=0.1) for s in assign_token_weights("grpo", make_groups([[1.0, 0.0]]))]
    trainer.step(batch_of([replace(s, reference_weight=0.0) for s in samples]))
    settings = NUMBERS | {"full_distributions": kind != "k3"}
    models = BaseTeacher(trainer, tiny_student_dir, layout, **settings), Teacher(tiny_student_dir, layout, **settings)
    of_base, of_copy = (gradients(trainer, references(kind, model).score(batch_of(samples))) for model in models)
    assert all(torch.equal(of_base[name], of_copy[name]) for name in of_copy)


@pytest.mark.parametrize("divergence", ["k3", "forward_kl"])
def test_a_run_starts_at_its_reference_and_leaves_it(divergence, load, layout, tmp_path):
    """Text and images, a teacher too: every response has the term, and at the first step it is exactly 0."""
    config = load(
        "rl",
        tmp_path / "run",
        "optimizer.lr=0.01",
        "objective.reference_beta=0.05",
        f"objective.reference_divergence={divergence}",
        "steps=2",
        "save_every=0",
    )
    train_rl(config)
    first, second = read_rows(config.run_dir / "metrics.jsonl")
    assert abs(first["reference_kl"]) < 1e-9 and abs(first["reference_loss"]) < 1e-9
    assert second["reference_kl"] > 1e-6 and second["reference_loss"] > 0
    assert "kl_teacher" in first, "the teacher's term is there beside it"


def test_what_cannot_work_is_one_line(load, layout, tmp_path, tiny_teacher_dir):
    with pytest.raises(ValueError, match=r"reference = .* is not read with objective.reference_beta = 0") as error:
        train_rl(load("rl", tmp_path / "run", f"reference={tiny_teacher_dir}"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"reference = .* reads text only and the student images too"):
        train_rl(load("rl", tmp_path / "run", f"reference={tiny_teacher_dir}", "objective.reference_beta=0.1"))


def test_grpo_with_a_reference_is_its_paper():
    """Every response weighs 1 / (G length), its reference term .04 of that (arXiv 2402.03300, Eq. 3 and 4)."""
    groups = make_groups([[1.0, 0.0], [0.0, 0.0]])
    samples = build_objective(ObjectiveConfig(preset="grpo-reference"), 13).assign_token_weights(groups)
    for sample in samples:
        assert sample.reference_weight == pytest.approx(0.04 / (4 * len(sample.response_ids)), rel=1e-12)
    assert [s.pg_weight != 0 for s in samples] == [True, True, False, False]
    assert not build_objective(ObjectiveConfig(preset="grpo-reference"), 13).has_gradient(groups[1])
    plain = build_objective(ObjectiveConfig(preset="grpo"), 13).assign_token_weights(groups)
    assert all(sample.reference_weight == 0 for sample in plain)
