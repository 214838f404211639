"""TOP-D's mixture and Uni-OPD's margin by hand-computed numbers, and their gradients in the trainer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from support.steps import LONGEST, batch_of, gradients, make_groups, make_teacher, make_trainer, relative
from vold.config.schema import ObjectiveConfig
from vold.objectives import build_objective
from vold.objectives.calibration import margin_advantages, mixed_teacher
from vold.teacher import CalibratedTeacher, NoTeacher

LOG = math.log


def build(**keys):
    return build_objective(ObjectiveConfig(**keys), LONGEST)


@pytest.mark.parametrize(
    ("teacher", "student", "share", "mixed"),
    [
        (0.5, 0.25, 0.5, 0.375),
        (0.5, 0.25, 1.0, 0.5),
        (1e-30, 0.25, 0.5, 0.125),  # the floor: a half of the student's, whatever the teacher says
        (0.9, 0.3, 0.2, 0.42),
    ],
)
def test_top_d_mixes_probabilities(teacher, student, share, mixed):
    found = mixed_teacher(torch.tensor(LOG(teacher)), torch.tensor(LOG(student)), share)
    assert math.exp(float(found)) == pytest.approx(mixed, rel=1e-6)


@pytest.mark.parametrize(
    ("gains", "right", "margin", "advantages"),
    [
        ([-1.0, -0.5], [1.0, 0.0], 0.4, [0.45, -0.45]),  # the wrong one is preferred by .5: .9 is missing
        ([-0.5, -1.0], [1.0, 0.0], 0.4, [0.0, 0.0]),
        ([-0.6, -0.4, -0.7, -0.9], [1.0, 1.0, 0.0, 0.0], 0.4, [0.05, 0.05, -0.05, -0.05]),  # means -.5 and -.8
        ([-1.0, -0.5], [1.0, 1.0], 0.4, [0.0, 0.0]),
        ([-1.0, -0.5], [0.0, 0.0], 0.4, [0.0, 0.0]),
        ([-1.0, -0.5], [0.5, 1.0], 0.2, [0.0, 0.0]),  # half right counts as wrong
        ([-0.5, -0.5], [1.0, 0.0], 0.0, [0.0, 0.0]),
    ],
)
def test_uni_opd_makes_up_for_a_missing_margin(gains, right, margin, advantages):
    assert margin_advantages(gains, right, margin) == pytest.approx(advantages, abs=1e-12)


def scored(samples, logps):
    """The samples as a remote teacher returns them, each token with the response's number."""
    return [replace(s, logp_teacher=[logp] * len(s.response_ids)) for s, logp in zip(samples, logps, strict=True)]


def test_the_margin_is_an_advantage_of_the_weight_of_the_kl(layout):
    """All rollouts have log-prob -1 a token: gains are logp + 1. In the first prompt the teacher prefers the wrong
    response by .5, in the second it keeps the margin; the third has no wrong one."""
    objective = build(preset="uni-opd")
    groups = make_groups([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    samples = scored(objective.assign_token_weights(groups), [-2.0, -1.5, -1.0, -3.0, -2.0, -1.0])
    teacher = CalibratedTeacher(NoTeacher(), objective, layout)
    (micro,) = teacher.score(batch_of(samples)).micro_batches
    expected = {0: 0.45, 1: -0.45}
    for sequence, sample in enumerate(micro.sample_B):
        rows = micro.sequence_N == sequence
        assert (micro.pg_weight_N[rows] == (micro.kl_weight_N[rows] if sample in expected else 0.0)).all()
        assert micro.advantage_N[rows].tolist() == pytest.approx([expected.get(sample, 0.0)] * int(rows.sum()))
    assert teacher.metrics == {"margin_shift": pytest.approx((0.9 + 0.0) / 2)}


def test_beside_rewards_it_joins_their_advantage(layout):
    """weight x advantage of the token grows by kl_weight x s / 2."""
    objective = build(preset="vold-unmasked", beta=0.3, margin=0.4)
    samples = scored(objective.assign_token_weights(make_groups([[1.0, 0.0]])), [-2.0, -1.5])
    (before,) = batch_of(samples).micro_batches
    (after,) = CalibratedTeacher(NoTeacher(), objective, layout).score(batch_of(samples)).micro_batches
    gained = after.pg_weight_N * after.advantage_N - before.pg_weight_N * before.advantage_N
    sign = torch.tensor([1.0 if after.sample_B[s] == 0 else -1.0 for s in after.sequence_N.tolist()])
    torch.testing.assert_close(gained, 0.45 * sign * before.kl_weight_N)


def test_top_ds_gradient_is_that_of_the_mixture(tiny_student_dir, layout):
    """From the trainer's own teacher, and a student that samples from its present weights."""
    objective = build(preset="top-d", teacher_share=0.25)
    trainer, plain = make_trainer(tiny_student_dir, layout), build(preset="opd")
    samples = objective.assign_token_weights(make_groups([[1.0, 0.0]]))
    logps = trainer.logprobs(batch_of(samples))
    samples = [replace(s, logp_rollout=logps[i]) for i, s in enumerate(samples)]
    shifted = [replace(s, logp_teacher=[x - 3.0 for x in logps[i]]) for i, s in enumerate(samples)]
    found = gradients(trainer, CalibratedTeacher(NoTeacher(), objective, layout).score(batch_of(shifted)))
    gap = LOG(0.25 * math.exp(-3.0) + 0.75)
    by_hand = [replace(s, logp_teacher=[x + gap for x in logps[i]]) for i, s in enumerate(samples)]
    expected = gradients(trainer, batch_of(by_hand))
    assert relative(found, expected) < 1e-4 and gap > LOG(0.75)
    assert max(float(g.abs().max()) for g in expected.values()) > 0
    assert plain.calibrates is False and objective.calibrates


def test_a_teacher_in_the_trainer_is_calibrated_too(tiny_student_dir, tiny_teacher_dir, layout):
    objective, teacher = build(preset="top-d"), make_teacher(tiny_teacher_dir, layout)
    samples = objective.assign_token_weights(make_groups([[1.0, 0.0]]))
    (before,) = teacher.score(batch_of(samples)).micro_batches
    (after,) = CalibratedTeacher(teacher, objective, layout).score(batch_of(samples)).micro_batches
    mixed = ((before.logp_teacher_N.exp() + before.logp_rollout_N.exp()) / 2).log()
    torch.testing.assert_close(after.logp_teacher_N, mixed)


@pytest.mark.parametrize(
    "keys",
    [
        {"preset": "grpo", "margin": 0.4},
        {"preset": "va-opd", "teacher_share": 0.5},
        {"preset": "sdpo", "margin": 0.1},
        {"preset": "opd", "divergence": "jsd", "margin": 0.1},
    ],
)
def test_without_a_teachers_sampled_log_probs_it_is_refused(keys):
    with pytest.raises(ValueError, match=r"objective\.(margin|teacher_share) is about a teacher's log-probs") as error:
        build(**keys)
    assert "\n" not in str(error.value)


def test_the_margin_needs_answers():
    objective = build(preset="uni-opd")
    assert objective.needs_reward and objective.routed_by == "accuracy"
    assert not build(preset="opd").needs_reward
