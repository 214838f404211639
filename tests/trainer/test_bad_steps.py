"""Steps that train nothing: without a gradient, or with a loss, likelihood or gradient that is not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.steps import VOCAB_SIZE, assign_token_weights, batch_of, make_groups, make_trainer
from vold.objectives import PRESETS
from vold.types import Batch, Prompt, Sample

MIXED, SOLVED = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def changed(trainer, step) -> tuple[float, dict]:
    """How far the furthest parameter moved in a step, and the step's metrics."""
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    metrics = step().metrics
    return max(float((p - before[name]).abs().max()) for name, p in trainer.parameters.items()), metrics


def poisoned(field: str, value: float) -> Batch:
    """A batch of which one token of one response has `value` in a field of MicroBatch."""
    (micro,) = batch_of(assign_token_weights("kdrl", make_groups(MIXED))).micro_batches
    numbers = getattr(micro, field)
    numbers = torch.full_like(micro.pg_weight_N, -1.0) if numbers is None else numbers.clone()
    numbers[(micro.kl_weight_N != 0).nonzero()[0]] = value
    return Batch((replace(micro, **{"logp_teacher_N": torch.full_like(micro.kl_weight_N, -1.0), field: numbers}),))


def test_a_step_without_gradient_moves_nothing_and_is_no_fault(tiny_student_dir, layout):
    """Momentum and weight decay alone would; any number of them in a row may come (a prompt set that is solved)."""
    trainer = make_trainer(tiny_student_dir, layout, objective=PRESETS["grpo"], weight_decay=0.1, max_bad_steps=2)
    trainer.step(batch_of(assign_token_weights("grpo", make_groups(MIXED))))
    solved = batch_of(assign_token_weights("grpo", make_groups(SOLVED)))
    for _ in range(3):
        moved, metrics = changed(trainer, lambda: trainer.step(solved))
        assert (moved, metrics["skipped"], metrics["grad_norm"]) == (0.0, 1.0, 0.0)
    moved, metrics = changed(trainer, lambda: trainer.step(batch_of(assign_token_weights("grpo", make_groups(MIXED)))))
    assert moved > 0 and metrics["skipped"] == 0.0


def test_the_average_that_teaches_rests_too(tiny_student_dir, layout):
    trainer = make_trainer(tiny_student_dir, layout, objective=PRESETS["srpo"], lr=1e-2)
    trainer.step(batch_of(assign_token_weights("grpo", make_groups(MIXED))))
    before = [p.detach().clone() for chunk in trainer.average.chunks for p in chunk.parameters()]
    trainer.step(batch_of(assign_token_weights("grpo", make_groups(SOLVED))))
    after = [p for chunk in trainer.average.chunks for p in chunk.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("field", ["logp_teacher_N", "logp_rollout_N", "advantage_N", "kl_weight_N"])
def test_what_is_not_finite_is_never_trained_through(field, value, tiny_student_dir, layout):
    """Whoever said it: the teacher, the sampler, the reward, the weights of a divergence."""
    trainer = make_trainer(tiny_student_dir, layout, objective=PRESETS["kdrl"])
    moved, metrics = changed(trainer, lambda: trainer.step(poisoned(field, value)))
    assert (moved, metrics["skipped"]) == (0.0, 1.0)


def test_a_likelihood_that_is_not_finite_is_named(tiny_student_dir, layout, caplog):
    """The student's own, which is broken here; after max_bad_steps in a row the run stops."""
    trainer = make_trainer(tiny_student_dir, layout, max_bad_steps=2)
    with torch.no_grad():
        next(p for name, p in trainer.parameters.items() if "final_layernorm" in name).fill_(float("nan"))
    batch = batch_of(assign_token_weights("grpo", make_groups(MIXED)))
    trainer.step(batch)
    assert "the likelihood of a response to p0 was not finite; this step trains nothing" in caplog.text
    with pytest.raises(ValueError, match=r"for 2 steps in a row \(optimizer.max_bad_steps\)"):
        trainer.step(batch)


def test_an_id_beyond_the_vocabulary_is_refused_before_it_is_trained(tiny_student_dir, layout):
    sample = Sample(Prompt("set:3", (2, 16), "q"), (17, VOCAB_SIZE), 1.0, 0.5, 0.0)
    trainer = make_trainer(tiny_student_dir, layout)
    with pytest.raises(ValueError, match=r"set:3: the response has token id 40 and ids end at 39"):
        trainer.step(batch_of([sample]))
