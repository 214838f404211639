"""The student's average as its teacher: its loss against plain torch, how it follows, and how a resume finds it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_methods_train import distribution, divergence, read
from test_step import as_megatron
from transformers import AutoModelForImageTextToText

from support.steps import LONGEST, batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import ObjectiveConfig, PromptConfig, SelfTeacherConfig
from vold.data.prompts import show_hint
from vold.models.tokenizer import load_tokenizer
from vold.objectives import build_objective
from vold.teacher import SelfTeacher
from vold.trainer.checkpoint import Checkpoints
from vold.types import Hint, Prompt

REWARDS = [[1.0, 0.0, 0.0], [0.0, 0.0], [1.0, 1.0, 0.0]]
VOCAB_SIZE = 40
FORM = SelfTeacherConfig(template="{problem}{demonstration}{feedback}", demonstration=" {demonstration}", feedback="")


def objective_of(preset: str, **keys):
    return build_objective(ObjectiveConfig(preset=preset, **keys), LONGEST)


def groups_with_texts():
    """Texts that the miniature's tokenizer knows, each its own."""
    groups = make_groups(REWARDS)
    return [
        replace(g, rollouts=tuple(replace(r, text=f"<think>1</think>{n}") for n, r in enumerate(g.rollouts)))
        for g in groups
    ]


@pytest.fixture
def condition(tiny_student_dir):
    tokenizer = load_tokenizer(tiny_student_dir)
    return partial(show_hint, tokenizer=tokenizer, config=PromptConfig(suffix=""), form=FORM)


def self_teacher(trainer, layout, condition, objective) -> SelfTeacher:
    numbers = dict(
        max_tokens=60, temperature=1.0, vocab_size=VOCAB_SIZE, confident=objective.self_distillation.confident
    )
    return SelfTeacher(trainer.average, layout, condition, **numbers)


@pytest.mark.parametrize("preset", ["sdpo", "srpo"])
def test_the_gradient_equals_the_formula_on_materialised_logits(preset, tiny_student_dir, layout, condition):
    objective = objective_of(preset, top_k=5)
    trainer = make_trainer(tiny_student_dir, layout, objective=objective)
    samples = objective.assign_token_weights(groups_with_texts())
    batch = self_teacher(trainer, layout, condition, objective).score(batch_of(samples, max_tokens=30))
    assert len(batch.micro_batches) > 1
    found = gradients(trainer, batch)

    model = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    taught = [s for s in samples if s.kl_weight]
    assert {s.hint.demonstration for s in taught} == ({"0", "1"} if preset == "sdpo" else {"0"})
    shown = [replace(s, prompt=condition(s.prompt, s.hint)) for s in taught]
    weights = [torch.exp(-read(model, s)[1].detach()) for s in shown]
    mean = torch.cat(weights).mean()
    for sample, conditioned, weight_T in zip(taught, shown, weights, strict=True):
        assert conditioned.prompt.token_ids.tolist() != sample.prompt.token_ids.tolist()
        jsd_T = divergence(distribution(model, sample), distribution(model, conditioned).detach(), 5)
        (sample.kl_weight * (weight_T / mean if preset == "srpo" else 1.0) * jsd_T).sum().backward()
    policy = [s for s in samples if s.pg_weight]
    assert bool(policy) == (preset == "srpo")
    for sample in policy:
        (-sample.pg_weight * sample.advantage * read(model, sample)[0]).sum().backward()
    assert relative(found, as_megatron(model, trainer)) < 1e-4


def test_confidence_is_normalised_over_the_update_not_over_a_micro_batch(tiny_student_dir, layout, condition):
    objective = objective_of("srpo")
    trainer = make_trainer(tiny_student_dir, layout, objective=objective)
    teacher, samples = (
        self_teacher(trainer, layout, condition, objective),
        objective.assign_token_weights(groups_with_texts()),
    )
    batches = [teacher.score(batch_of(samples, max_tokens=size)) for size in (1, 1000)]
    weights = [
        torch.cat([m.kl_weight_N[m.kl_weight_N != 0] for m in batch.micro_batches]).sort().values for batch in batches
    ]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=0)
    assert weights[0].mean() == pytest.approx(max(s.kl_weight for s in samples), rel=1e-5)
    assert weights[0].std() > 0
    assert relative(*(gradients(trainer, batch) for batch in batches)) < 1e-5


def test_a_self_teacher_reads_the_parts_of_a_hint_that_there_are(tiny_student_dir):
    """Braces in what is put in stay as they are."""
    problem, tokenizer = Prompt("p", (1,), "What is {feedback}?"), load_tokenizer(tiny_student_dir)
    texts = [
        show_hint(problem, hint, tokenizer, PromptConfig(), SelfTeacherConfig()).text
        for hint in (Hint("It is {problem}."), Hint(None, "Wrong."), Hint("It is 7.", "Wrong."))
    ]
    shown, told, end = (
        "\n\nA correct solution of this problem:\n\n",
        "\n\nYour earlier attempt failed:\n\n",
        "\n\nSolve the problem correctly.",
    )
    assert texts == [
        f"What is {{feedback}}?{shown}It is {{problem}}.{end}",
        f"What is {{feedback}}?{told}Wrong.{end}",
        f"What is {{feedback}}?{shown}It is 7.{told}Wrong.{end}",
    ]
    with pytest.raises(ValueError, match=r"self_teacher.template = '\{problem\}' lacks \{demonstration\}; put it in"):
        SelfTeacherConfig(template="{problem}")


def test_a_step_in_which_nobody_can_be_taught(tiny_student_dir, layout, condition):
    """No response of any prompt is right: nothing is read, and GRPO has nothing to learn either."""
    objective = objective_of("srpo")
    trainer = make_trainer(tiny_student_dir, layout, objective=objective)
    batch = batch_of(objective.assign_token_weights(make_groups([[0.0, 0.0], [0.0, 0.0]])))
    scored = self_teacher(trainer, layout, condition, objective).score(batch)
    assert all(micro.hidden_teacher_nE is None for micro in scored.micro_batches)
    metrics = trainer.step(scored).metrics
    assert metrics["gradient_tokens"] == metrics["grad_norm"] == 0 and "kl_teacher" not in metrics


def test_the_average_follows_and_comes_back_from_a_checkpoint(tiny_student_dir, layout, condition, tmp_path):
    objective = objective_of("srpo", average_rate=0.25)
    trainer = make_trainer(tiny_student_dir, layout, objective=objective)
    teacher = self_teacher(trainer, layout, condition, objective)
    before = [p.clone() for chunk in trainer.average.chunks for p in chunk.parameters()]
    for _ in range(2):
        trainer.step(teacher.score(batch_of(objective.assign_token_weights(groups_with_texts()))))
        after = [p.clone() for chunk in trainer.average.chunks for p in chunk.parameters()]
        student = [p.detach() for chunk in trainer.chunks for p in chunk.parameters()]
        for was, now, theirs in zip(before, after, student, strict=True):
            torch.testing.assert_close(now, 0.75 * was + 0.25 * theirs)
        before = after
    assert max(float((a - s).abs().max()) for a, s in zip(after, student, strict=True)) > 0
    checkpoints = Checkpoints(tmp_path, layout)
    checkpoints.save(trainer, 2)
    resumed = make_trainer(tiny_student_dir, layout, objective=objective)
    checkpoints.load(resumed, 2)
    found = [p for chunk in resumed.average.chunks for p in chunk.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, after, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.average.fp32.values(), trainer.average.fp32.values(), strict=True)
    )
