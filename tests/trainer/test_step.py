"""One optimisation step, on Megatron: the method's identities, and invariance to every split of a batch."""

from __future__ import annotations

import traceback
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from support.steps import (
    VOCAB_SIZE,
    assign_token_weights,
    batch_of,
    gradients,
    make_groups,
    make_teacher,
    make_trainer,
    relative,
    with_advantages,
)
from vold.models.checkpoint_dir import short_name
from vold.models.weight_rules import join_pieces, named_rules
from vold.objectives import assign_sft_weights
from vold.teacher import Teacher
from vold.trainer import trainer as engine
from vold.trainer.metrics import reduce_stats
from vold.trainer.optimizer import optimizer_state
from vold.types import Batch
from vold_kernels import linear_policy_loss

MIXED = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


@pytest.fixture(scope="module")
def trainer(tiny_student_dir, layout):
    return make_trainer(tiny_student_dir, layout)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir, layout):
    return make_teacher(tiny_teacher_dir, layout)


@pytest.fixture(scope="module")
def self_teacher(tiny_student_dir, layout):
    return make_teacher(tiny_student_dir, layout)


def test_gradient_equals_the_formula_on_materialised_logits(trainer, teacher, tiny_student_dir):
    """VOLD Eq. 6 in plain torch on a transformers model, sequence by sequence, against one Megatron step."""
    samples = assign_token_weights("vold", make_groups(MIXED))
    batch = teacher.score(batch_of(samples, max_tokens=40))
    found = gradients(trainer, batch)
    model = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    logp_teacher = _teacher_by_sample(batch)
    for index, sample in enumerate(samples):
        logp = _logp(model, sample)
        ratio = (logp - logp.detach()).exp()
        surrogate = -torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.3) * sample.advantage)
        loss = (sample.pg_weight * surrogate).sum()
        if sample.kl_weight:
            loss = loss + (sample.kl_weight * 0.5 * (logp - logp_teacher[index]) ** 2).sum()
        loss.backward()
    assert relative(found, as_megatron(model, trainer)) < 1e-4


def test_stale_rollouts_are_weighted_as_the_formula_on_materialised_logits(teacher, tiny_student_dir, layout):
    """Both terms of each token times w = min(pi / pi_rollout, 2), a constant; and what the metrics say of w."""
    cap, draw = 2.0, torch.Generator().manual_seed(0)
    trainer = make_trainer(tiny_student_dir, layout, importance_cap=cap)
    samples = assign_token_weights("vold", make_groups(MIXED))
    logp_now = trainer.logprobs(batch_of(samples))
    for index, logp in logp_now.items():
        logp_rollout = torch.tensor(logp) + torch.randn(len(logp), generator=draw)
        samples[index] = replace(samples[index], logp_rollout=tuple(logp_rollout.tolist()))
    batch = teacher.score(batch_of(samples, max_tokens=40))
    found = gradients(trainer, batch)
    metrics, _ = reduce_stats(trainer.accumulate_gradients(batch), None, train_tflop=0.0)
    model = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    logp_teacher, ratios = _teacher_by_sample(batch), []
    for index, sample in enumerate(samples):
        logp = _logp(model, sample)
        ratio = (logp.detach() - torch.tensor(sample.logp_rollout)).exp()
        loss = -sample.pg_weight * sample.advantage * (logp - logp.detach()).exp()
        if sample.kl_weight:
            loss = loss + sample.kl_weight * 0.5 * (logp - logp_teacher[index]) ** 2
        (ratio.clamp(max=cap) * loss).sum().backward()
        ratios.append(ratio)
    assert relative(found, as_megatron(model, trainer)) < 1e-4
    ratio_N = torch.cat(ratios)
    weight_N = ratio_N.clamp(max=cap)
    share = float((ratio_N > cap).float().mean())
    assert 0.1 < share < 0.5 and metrics["importance_truncated"] == pytest.approx(share)
    size = float(weight_N.sum() ** 2 / (len(weight_N) * weight_N.square().sum()))
    assert metrics["effective_sample_size"] == pytest.approx(size, rel=1e-4) and size < 0.95
    strict = make_trainer(tiny_student_dir, layout)
    assert relative(found, gradients(strict, batch)) > 1e-2
    assert "effective_sample_size" not in reduce_stats(strict.accumulate_gradients(batch), None, train_tflop=0.0)[0]


def _logp(model, sample) -> torch.Tensor:
    """Of each response token, from logits [T, V]."""
    ids = torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()]])
    logits = model(ids).logits[0, len(sample.prompt.token_ids) - 1 : -1, :VOCAB_SIZE]
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids.tolist())[:, None])[:, 0]


def test_k2_identity(trainer, teacher):
    """At ratio 1 VOLD has exactly the gradient of GRPO with token advantage A + beta (1 - r)(logp_T - logp_S)."""
    beta = 0.3
    samples = assign_token_weights("vold", make_groups(MIXED), beta=beta)
    samples = with_advantages(samples, [s.advantage for s in samples])
    batch = teacher.score(batch_of(samples))
    logp = trainer.logprobs(batch)
    shaped = []
    for micro in batch.micro_batches:
        logp_N = torch.cat([torch.tensor(logp[sample]) for sample in micro.sample_B])
        pull = micro.kl_weight_N / micro.pg_weight_N * (micro.logp_teacher_N - logp_N)
        shaped.append(replace(micro, advantage_N=micro.advantage_N + pull, kl_weight_N=0 * micro.kl_weight_N))
    vold, grpo = gradients(trainer, batch), gradients(trainer, Batch(tuple(shaped)))
    assert relative(vold, grpo) < 1e-5
    assert relative(vold, gradients(trainer, batch_of(assign_token_weights("grpo", make_groups(MIXED))))) > 1e-2


def test_gradient_depends_on_the_teacher(trainer, teacher, self_teacher):
    batch = batch_of(assign_token_weights("vold", make_groups(MIXED)))
    assert relative(gradients(trainer, teacher.score(batch)), gradients(trainer, self_teacher.score(batch))) > 1e-2


def test_all_correct_batch_equals_grpo_bit_for_bit(trainer, teacher):
    """Every reward 1, advantages from elsewhere so that the comparison is not of zeros."""
    groups = make_groups([[1.0, 1.0, 1.0], [1.0, 1.0]])
    advantages = [0.5, -1.0, 0.25, 2.0, -0.75]
    vold = gradients(
        trainer, teacher.score(batch_of(with_advantages(assign_token_weights("vold", groups), advantages)))
    )
    grpo = gradients(trainer, batch_of(with_advantages(assign_token_weights("grpo", groups), advantages)))
    assert all(torch.equal(vold[name], grpo[name]) for name in grpo)
    assert max(float(g.abs().max()) for g in grpo.values()) > 0


def test_self_teacher_has_no_kl(tiny_student_dir, layout, self_teacher):
    trainer = make_trainer(tiny_student_dir, layout, lr=1e-12)
    report = trainer.step(self_teacher.score(batch_of(assign_token_weights("opd", make_groups(MIXED)))))
    assert report.metrics["kl_teacher"] < 1e-10
    assert report.metrics["grad_norm"] < 1e-5
    assert report.metrics["kl_tokens"] > 0


def test_gradient_is_invariant_to_the_micro_batch_split(trainer, teacher):
    samples = assign_token_weights("vold", make_groups(MIXED))
    whole = gradients(trainer, teacher.score(batch_of(samples)))
    for max_tokens, fillers in ((60, 0), (30, 0), (1, 2)):
        batch = batch_of(samples, max_tokens=max_tokens, fillers=fillers)
        assert len(batch.micro_batches) > 1
        assert relative(gradients(trainer, teacher.score(batch)), whole) < 1e-5
    assert any(micro.target_N.numel() == 0 for micro in batch.micro_batches), "an all-masked micro-batch was tried"


def test_samples_without_gradient_are_left_out_exactly(trainer, teacher):
    """Neither gradient nor metrics change when they run through the backbone after all; only the tokens run do."""
    samples = assign_token_weights("vold", make_groups([*MIXED, [1.0, 1.0, 1.0]]))
    lean = teacher.score(batch_of(samples))
    everything = batch_of([replace(s, pg_weight=1.0) for s in samples])
    weights = {kind: [torch.tensor(getattr(s, kind)) for s in samples] for kind in ("pg_weight", "kl_weight")}
    full = teacher.score(Batch(tuple(_with_weights(micro, weights) for micro in everything.micro_batches)))
    assert _sequences(lean) == len(samples) - 3 < _sequences(full) == len(samples), "without the solved group"
    assert relative(gradients(trainer, lean), gradients(trainer, full)) < 1e-6
    found, expected = (reduce_stats(trainer.accumulate_gradients(b), None, train_tflop=0.0)[0] for b in (lean, full))
    assert found == pytest.approx(expected, rel=1e-6)


def _sequences(batch: Batch) -> int:
    return sum(len(micro.sample_B) for micro in batch.micro_batches)


def _with_weights(micro, weights):
    sample_N = torch.tensor(micro.sample_B)[micro.sequence_N]
    return replace(micro, **{f"{kind}_N": torch.stack(of)[sample_N].float() for kind, of in weights.items()})


def test_masks_come_from_lengths_not_from_values(trainer):
    """A response full of the pad and end ids counts like any other."""
    groups = make_groups([[1.0, 0.0]])
    samples = assign_token_weights("grpo", groups)
    padded = [replace(s, response_ids=(0,) * len(s.response_ids)) for s in samples]
    batch = batch_of(padded)
    assert batch.micro_batches[0].target_N.numel() == sum(len(s.response_ids) for s in samples)
    assert set(batch.micro_batches[0].target_N.tolist()) == {0}


def test_sft_gradient_is_that_of_the_mean_nll(trainer, tiny_student_dir):
    samples = assign_sft_weights(assign_token_weights("grpo", make_groups(MIXED)))
    found = gradients(trainer, batch_of(samples, max_tokens=50))
    model = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    tokens = sum(len(s.response_ids) for s in samples)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()]])
        logits = model(ids).logits[0, len(sample.prompt.token_ids) - 1 : -1, :VOCAB_SIZE]
        (
            torch.nn.functional.cross_entropy(logits, ids[0, len(sample.prompt.token_ids) :], reduction="sum") / tokens
        ).backward()
    assert relative(found, as_megatron(model, trainer)) < 1e-4


def test_a_non_finite_gradient_changes_nothing_and_stops_after_several(tiny_student_dir, layout):
    trainer = make_trainer(tiny_student_dir, layout, max_bad_steps=2)
    batch = batch_of(assign_token_weights("grpo", make_groups(MIXED)))
    poisoned = Batch(tuple(replace(m, advantage_N=m.advantage_N * float("nan")) for m in batch.micro_batches))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    report = trainer.step(poisoned)
    assert report.metrics["skipped"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())
    assert trainer.step(batch).metrics["skipped"] == 0.0
    trainer.step(poisoned)
    with pytest.raises(ValueError, match="2 steps in a row"):
        trainer.step(poisoned)


def test_the_schedule_never_spends_an_update_at_rate_zero(tiny_student_dir, layout):
    trainer = make_trainer(tiny_student_dir, layout, steps=6, warmup_steps=2, schedule="cosine")
    batch = batch_of(assign_token_weights("grpo", make_groups(MIXED)))
    rates = [trainer.step(batch).metrics["lr"] for _ in range(6)]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert all(a > b > 0 for a, b in pairwise(rates[1:]))


def test_bfloat16_trains_fp32_masters(tiny_student_dir, tiny_teacher_dir, layout):
    """The same first step as in fp32 within bfloat16's resolution; masters, not the bf16 weights, are the state."""
    batch = batch_of(assign_token_weights("vold", make_groups(MIXED)))
    reports, trainers = [], []
    for dtype in (torch.float32, torch.bfloat16):
        trainers.append(make_trainer(tiny_student_dir, layout, dtype=dtype, lr=1e-5))
        teacher = make_teacher(tiny_teacher_dir, layout, dtype=dtype)
        reports.append(trainers[-1].step(teacher.score(batch)).metrics)
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=0.05)
    assert reports[1]["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=0.05)
    states = [optimizer_state(trainers[1].optimizer, parameter) for parameter in trainers[1].parameters.values()]
    assert {state["main"].dtype for state in states} == {torch.float32}
    assert {p.dtype for p in trainers[1].parameters.values()} == {torch.bfloat16}


def test_norms_and_biases_are_not_decayed(trainer):
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in trainer.parameters.items():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name


def as_megatron(model, trainer) -> dict[str, torch.Tensor]:
    """A transformers model's gradients under Megatron's names and layout."""
    [language_model] = trainer.chunks
    by_name = {short_name(name): p.grad for name, p in model.named_parameters()}
    return {
        name: join_pieces(rule, [by_name[short] for short in rule.names], language_model.arch)
        for name, _, rule in named_rules(language_model)
    }


def _teacher_by_sample(batch: Batch) -> dict[int, torch.Tensor]:
    return {
        sample: micro.logp_teacher_N[micro.sequence_N == sequence]
        for micro in batch.micro_batches
        for sequence, sample in enumerate(micro.sample_B)
    }


@pytest.mark.parametrize("recompute", ["swiglu", "selective", "full"])
def test_recomputed_activations_give_the_same_gradient(trainer, tiny_student_dir, layout, recompute):
    batch = batch_of(assign_token_weights("grpo", make_groups(MIXED)), max_tokens=60)
    again = make_trainer(tiny_student_dir, replace(layout, recompute=recompute))
    assert relative(gradients(again, batch), gradients(trainer, batch)) < 1e-6
    assert again.logprobs(batch) == trainer.logprobs(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gradient_goes_straight_into_main_grad(tiny_student_dir, layout, monkeypatch, dtype):
    """Against the ordinary way through autograd, which rounds it to bf16 in a bf16 model."""
    trainer = make_trainer(tiny_student_dir, layout, dtype=dtype)
    batch = batch_of(assign_token_weights("grpo", make_groups(MIXED)), max_tokens=60)
    straight = gradients(trainer, batch)

    def through_autograd(*arguments, weight_main_grad, **keywords):
        assert weight_main_grad is trainer.chunks[-1].head_weight().main_grad
        return linear_policy_loss(*arguments, **keywords)

    monkeypatch.setattr(engine, "linear_policy_loss", through_autograd)
    assert relative(straight, gradients(trainer, batch)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_an_offloaded_teacher_scores_the_same_and_leaves_the_device(teacher, tiny_teacher_dir, layout):
    batch = batch_of(assign_token_weights("vold", make_groups(MIXED)), max_tokens=60)
    offloaded = Teacher(tiny_teacher_dir, layout, dtype=torch.float32, vocab_size=VOCAB_SIZE, offload=True)
    for found, expected in zip(offloaded.score(batch).micro_batches, teacher.score(batch).micro_batches, strict=True):
        assert torch.equal(found.logp_teacher_N, expected.logp_teacher_N)
    assert all(parameter.device.type == "cpu" for chunk in offloaded._chunks for parameter in chunk.parameters())


def test_at_most_five_calls_of_our_own_from_the_step_loop_to_the_fused_loss(tiny_student_dir, layout, monkeypatch):
    """The loop of vold/train/rl.py calls Trainer.step as this test does. Calls into torch and Megatron do not count."""
    trainer = make_trainer(tiny_student_dir, layout)
    stacks = []

    def recorded(*arguments, **keywords):
        stacks.append(traceback.extract_stack())
        return linear_policy_loss(*arguments, **keywords)

    monkeypatch.setattr(engine, "linear_policy_loss", recorded)
    trainer.step(batch_of(assign_token_weights("grpo", make_groups(MIXED))))
    package = Path(engine.__file__).parents[1]
    [calls] = [[frame.name for frame in stack if Path(frame.filename).is_relative_to(package)] for stack in stacks]
    assert calls == ["step", "accumulate_gradients", "run_pipeline", "_loss"]
    assert len([*calls, "linear_policy_loss"]) <= 5
