"""linear_policy_loss against the specification. The same file runs in plain torch, interpreted and on a GPU."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    CHUNK,
    CLIP,
    DEVICE,
    INTERPRETED,
    Problem,
    Recorder,
    assert_near,
    assert_same_record,
    bounded,
    coupled,
    gradients,
    policy_terms,
    problem,
    relative,
    small_chunks,
    with_fields,
)

from vold_kernels import ChunkBudget, PolicyTerms, linear_logprob, linear_policy_loss, matmuls, reference
from vold_kernels.chunks import slices
from vold_kernels.head import filter_threshold

FACTOR = -1.7  # the upstream gradient of the loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 77), (2 * CHUNK + 3, 77), (CHUNK + 1, 1000), (3, 5000)])
def test_float64_equals_the_specification(tokens, vocab, temperature):
    case = problem(tokens, vocab)
    terms = policy_terms(case, temperature=temperature)
    actual = linear_policy_loss(*case, terms, **CLIP, temperature=temperature, budget=small_chunks(vocab))
    expected = reference.linear_policy_loss(*case, terms, **CLIP, temperature=temperature)
    assert expected.loss != 0
    assert_same_record(actual, expected, 1e-12)
    actual, expected = (gradients(FACTOR * record.loss, case) for record in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize("vocab", [77, 1000])
def test_a_reference_adds_k3(vocab):
    """Beside both other terms and importance weights, with tokens that have that term alone, and NaN where none is."""
    case = problem(2 * CHUNK + 3, vocab)
    terms = policy_terms(case)
    has_N = torch.arange(len(terms.advantage_N), device=DEVICE) % 3 != 0
    logp_N = reference.linear_logprob(*case.to(torch.float64)).detach()
    shift_N = torch.linspace(-1, 1, len(logp_N), dtype=torch.float64, device=DEVICE)
    terms = replace(
        terms,
        logp_rollout_N=logp_N + 0.2 * shift_N,
        logp_reference_N=(logp_N + shift_N).where(has_N, torch.nan),
        reference_weight_N=(0.3 + shift_N.abs()).where(has_N, 0.0),
    )
    actual = linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(vocab))
    expected = reference.linear_policy_loss(*case, terms, **CLIP)
    assert expected.reference_loss > 0.1
    assert_same_record(actual, expected, 1e-12)
    for a, b in zip(*(gradients(record.loss, case) for record in (actual, expected)), strict=True):
        assert relative(a, b) < 1e-12
    with pytest.raises(ValueError, match="give both or neither"):
        linear_policy_loss(*case, replace(terms, reference_weight_N=None), **CLIP)


def test_both_bounds_are_met_in_the_cases_above():
    case = problem(2 * CHUNK + 3, 77)
    record = linear_policy_loss(*case, policy_terms(case), **CLIP)
    assert record.clip_count_low + record.clip_count_high > 0 and record.kl_loss > 0 and record.pg_loss != 0
    assert record.loss.requires_grad
    assert not any(value.requires_grad for name, value in vars(record).items() if name != "loss")


def test_gradcheck():
    case = problem(4, 19, width=3)
    terms = policy_terms(case)

    def loss(hidden_ND, weight_VD):
        budget = small_chunks(19, tokens=2)
        record = linear_policy_loss(hidden_ND, weight_VD, case.target_N, terms, **CLIP, temperature=0.8, budget=budget)
        return FACTOR * record.loss

    assert torch.autograd.gradcheck(loss, case.leaves)


def test_float32_is_within_5e_6():
    case = problem(9, 1000, width=16)
    case = Problem(case.hidden_ND, case.weight_VD.detach() * 0.5, case.target_N).to(torch.float32)
    terms, exact_case = policy_terms(case), case.to(torch.float64)
    actual = linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(1000, itemsize=4))
    expected = reference.linear_policy_loss(*exact_case, terms, **CLIP)
    assert actual.loss.dtype == torch.float32
    assert_same_record(actual, expected, 5e-6)
    actual, expected = gradients(FACTOR * actual.loss, case), gradients(FACTOR * expected.loss, exact_case)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 5e-6


OPTIONS = {
    "sequence": (coupled, {}),
    "bounds": (bounded, {}),
    "entropy": (lambda terms: terms, {"entropy_bonus": 0.3}),
    "clamp": (lambda terms: terms, {"kl_clamp": 0.5}),
    "constant ratio": (bounded, {"surrogate": "constant-ratio"}),
    "gate": (lambda terms: terms, {"surrogate": "gate", "gate_temperatures": (2.5, 1.5)}),
    "gate of sequences": (coupled, {"surrogate": "gate"}),
    "all": (lambda terms: bounded(coupled(terms)), {"entropy_bonus": -0.2, "kl_clamp": 0.5}),
}


@pytest.mark.parametrize("resident", [CHUNK, 64], ids=["recomputed", "resident"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_beyond_the_clipped_token_ratio_equal_the_specification(name, resident):
    change, numbers = OPTIONS[name]
    case = problem(2 * CHUNK + 3, 77)
    terms = change(policy_terms(case, temperature=0.7))
    keywords = {**CLIP, **numbers, "temperature": 0.7}
    actual = linear_policy_loss(*case, terms, **keywords, budget=small_chunks(77, tokens=resident))
    expected = reference.linear_policy_loss(*case, terms, **keywords)
    plain = reference.linear_policy_loss(*case, policy_terms(case, temperature=0.7), **CLIP, temperature=0.7)
    assert (expected.loss - plain.loss).abs() > 1e-3
    assert_same_record(actual, expected, 1e-12)
    actual, expected = (gradients(FACTOR * record.loss, case) for record in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12


def test_ratios_beyond_the_bounds_by_hand():
    """Four tokens with log-ratios .5, .5, −.5, −.5 and A 2, −1, 2, −1."""
    case = problem(4, 77)
    logp_N = reference.linear_logprob(*case).detach()
    like = {"dtype": torch.float64, "device": DEVICE}
    gap_N, advantage_N = torch.tensor([0.5, 0.5, -0.5, -0.5], **like), torch.tensor([2.0, -1.0, 2.0, -1.0], **like)
    ones_N = torch.ones(4, **like)
    terms = PolicyTerms(logp_N - gap_N, None, advantage_N, ones_N, 0 * ones_N)
    high, low = math.exp(0.5), math.exp(-0.5)

    def slope(temperature, ratio):
        gate = 1 / (1 + math.exp(-temperature * (ratio - 1)))
        return 4 * gate * (1 - gate) * ratio

    expected = {
        "clip": [0.0, high, -2 * low, 0.0],
        "constant-ratio": [-2 * 1.3, 1.3, -2 * 0.8, 0.8],
        "gate": [-2 * slope(1, high), slope(1.05, high), -2 * slope(1, low), slope(1.05, low)],
    }
    for surrogate, coefficients in expected.items():
        record = linear_policy_loss(*case, terms, clip_eps_low=0.2, clip_eps_high=0.3, surrogate=surrogate)
        by_hand = (torch.tensor(coefficients, **like) * reference.linear_logprob(*case)).sum()
        for a, b in zip(gradients(record.loss, case), gradients(by_hand, case), strict=True):
            assert relative(a, b) < 1e-12
        counts = (record.clip_count_low.item(), record.clip_count_high.item())
        assert counts == {"clip": (1, 1), "constant-ratio": (2, 2), "gate": (0, 0)}[surrogate]


def test_a_sequence_ratio_by_hand():
    """Two sequences, of 2 and of 3 tokens: exp of the mean log-ratio, once clipped, once not; each token carries
    pg_weight · A · s of its sequence, spread evenly over it."""
    case = problem(5, 77)
    logp_N = reference.linear_logprob(*case).detach()
    sequence_N = torch.tensor([7, 7, 4, 4, 4], device=DEVICE)
    gap_N = torch.tensor([0.5, 0.1, 0.3, -0.6, 0.0], dtype=torch.float64, device=DEVICE)  # means 0.3 and −0.1
    advantage_N = torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64, device=DEVICE)
    weight_N = torch.tensor([0.25, 0.25, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64, device=DEVICE)
    terms = PolicyTerms(logp_N - gap_N, None, advantage_N, weight_N, 0 * weight_N, sequence_N=sequence_N)
    first, second = math.exp(0.3), math.exp(-0.1)
    record = linear_policy_loss(*case, terms, clip_eps_low=0.2, clip_eps_high=0.4)
    assert_near(record.loss, torch.tensor(-first + 0.5 * second, dtype=torch.float64, device=DEVICE), 1e-12)
    coefficient_N = torch.tensor([-first / 2] * 2 + [second / 6] * 3, dtype=torch.float64, device=DEVICE)
    expected = gradients((coefficient_N * reference.linear_logprob(*case)).sum(), case)
    for a, b in zip(gradients(record.loss, case), expected, strict=True):
        assert relative(a, b) < 1e-12
    tight = linear_policy_loss(*case, terms, clip_eps_low=0.2, clip_eps_high=0.3)
    assert (tight.clip_count_high.item(), tight.clip_count_low.item()) == (2, 0)
    assert torch.all(gradients(tight.loss, case)[0][:2] == 0)


def test_kl_clamp_bounds_the_gradient_of_one_token_and_no_other():
    case = problem(2, 77)
    logp_N = reference.linear_logprob(*case).detach()
    gap_N = torch.tensor([3.0, -0.4], dtype=torch.float64, device=DEVICE)
    ones = torch.ones_like(gap_N)
    record = linear_policy_loss(*case, PolicyTerms(None, logp_N - gap_N, 0 * ones, 0 * ones, ones), **CLIP, kl_clamp=1)
    assert_near(record.kl_loss, torch.tensor(3.0 - 0.5 + 0.08, dtype=torch.float64, device=DEVICE), 1e-12)
    clamped_gap_N = torch.tensor([1.0, -0.4], dtype=torch.float64, device=DEVICE)
    expected = gradients((clamped_gap_N * reference.linear_logprob(*case)).sum(), case)
    assert relative(gradients(record.loss, case)[0], expected[0]) < 1e-12


def test_coupled_tokens_never_hold_more_logits_than_the_budget():
    tokens, vocab, width = 64, 1000, 6
    case = problem(tokens, vocab, width=width, dtype=torch.float32)
    terms = coupled(policy_terms(case))
    kept = int(((terms.pg_weight_N != 0) | (terms.kl_weight_N != 0)).sum())
    with Recorder() as recorder:
        linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(vocab, itemsize=4, columns=250)).loss.backward()
    assert case.weight_VD.grad.abs().sum() > 0
    assert recorder.largest == 4 * max(vocab * width, CHUNK * vocab, tokens * width) < 4 * tokens * vocab / 10
    with Recorder() as resident:
        linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(vocab, itemsize=4, tokens=kept))
    alone = replace(terms, sequence_N=None)
    with Recorder() as uncoupled:
        linear_policy_loss(*case, alone, **CLIP, budget=small_chunks(vocab, itemsize=4, tokens=kept))
    assert resident.matmuls == uncoupled.matmuls, "where one chunk holds all tokens, no logits are computed twice"
    with Recorder() as reading, torch.no_grad():
        linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(vocab, itemsize=4, columns=250))
    assert reading.matmuls == -(-kept // (CHUNK - 1)) * 4, "tile by tile, without a second pass"


def eager_loss(case: Problem, terms: PolicyTerms) -> torch.Tensor:
    """The loss of a trainer without these kernels in bf16: bf16 logits, log-softmax in bf16, the loss in fp32."""
    logp_N = (case.hidden_ND @ case.weight_VD.T).log_softmax(-1).gather(1, case.target_N[:, None])[:, 0].float()
    ratio = (logp_N - terms.logp_old_N).exp()
    surrogate = torch.minimum(ratio * terms.advantage_N, ratio.clamp(0.8, 1.3) * terms.advantage_N)
    gap = logp_N - terms.logp_teacher_N
    return (-terms.pg_weight_N * surrogate + terms.kl_weight_N * gap.square() / 2).sum()


def test_bfloat16_inputs_err_less_than_eager_bfloat16():
    case = problem(12, 1000, width=32, dtype=torch.bfloat16)
    terms, exact_case = policy_terms(case), case.to(torch.float64)
    # Half the tokens far inside the clip range, half far outside: rounding may not move one across an edge.
    shift_N = torch.where(torch.arange(12) < 6, 0.05, 0.8).to(DEVICE)
    terms = replace(terms, logp_old_N=reference.linear_logprob(*exact_case).detach() - shift_N)
    actual = linear_policy_loss(*case, terms, **CLIP)
    expected = reference.linear_policy_loss(*exact_case, terms, **CLIP)
    eager = eager_loss(case, terms)
    error, eager_error = (abs(x.item() - expected.loss.item()) for x in (actual.loss, eager))
    assert error < 1e-4 and error < eager_error / 10
    assert actual.clip_count_high == expected.clip_count_high > 0
    ours, exact = gradients(FACTOR * actual.loss, case), gradients(FACTOR * expected.loss, exact_case)
    for a, b, e, bound in zip(ours, exact, gradients(FACTOR * eager, case), (4e-3, 3e-3), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) <= max(bound, 1.25 * relative(e, b))


def test_the_real_vocabulary():
    case = problem(2, 151936, width=4, dtype=torch.float32)
    terms, exact_case = policy_terms(case), case.to(torch.float64)
    terms = replace(terms, pg_weight_N=torch.ones_like(terms.pg_weight_N))
    actual = linear_policy_loss(*case, terms, **CLIP)
    expected = reference.linear_policy_loss(*exact_case, terms, **CLIP)
    assert_same_record(actual, expected, 5e-6)
    eager = gradients(reference.linear_policy_loss(*case, terms, **CLIP).loss, case)
    actual, expected = gradients(actual.loss, case), gradients(expected.loss, exact_case)
    for a, b, e in zip(actual, expected, eager, strict=True):
        assert relative(a, b) <= max(5e-6, 1.25 * relative(e, b))


def test_on_policy_is_a_ratio_of_exactly_one():
    case = problem(9, 77)
    terms = policy_terms(case)
    at_ratio_one = replace(terms, logp_old_N=linear_logprob(*case).detach())
    given = linear_policy_loss(*case, at_ratio_one, **CLIP)
    none = linear_policy_loss(*case, replace(terms, logp_old_N=None), **CLIP)
    assert_same_record(none, given, 1e-12)
    assert none.pg_loss == -(terms.pg_weight_N * terms.advantage_N).sum() and none.kl_old == 0
    for a, b in zip(gradients(none.loss, case), gradients(given.loss, case), strict=True):
        assert relative(a, b) < 1e-12
    # The range may even be empty: at ratio 1 nothing is clipped, and dL_pg/dlogp = −A.
    tight = linear_policy_loss(*case, replace(terms, logp_old_N=None), clip_eps_low=0.0, clip_eps_high=0.0)
    assert torch.equal(tight.loss, none.loss) and tight.clip_count_low == tight.clip_count_high == 0


def test_the_old_policys_logprob_is_ours_to_rounding():
    case = problem(9, 1000, width=32, dtype=torch.float32)
    ones = torch.ones(9, device=DEVICE)
    terms = PolicyTerms(None, None, ones, ones, 0 * ones)
    logp_N = linear_policy_loss(*case, terms, **CLIP).logp_N
    assert_near(linear_logprob(*case), logp_N, 5e-7)


def test_the_four_sides_of_the_clip():
    case = problem(5, 77)
    logp_N = reference.linear_logprob(*case).detach()
    ratio_N = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], dtype=torch.float64, device=DEVICE)
    advantage_N = torch.tensor([1.0, 1.0, -1.0, -1.0, -2.0], dtype=torch.float64, device=DEVICE)
    ones = torch.ones_like(ratio_N)
    terms = PolicyTerms(logp_N - ratio_N.log(), None, advantage_N, ones, 0 * ones)
    record = linear_policy_loss(*case, terms, **CLIP)
    assert (record.clip_count_high.item(), record.clip_count_low.item()) == (1, 1)
    assert_near(record.pg_loss, -torch.tensor(1.3 + 0.5 - 1.5 - 0.8 - 2.2, dtype=torch.float64, device=DEVICE), 1e-12)
    coefficient_N = torch.tensor([0.0, -0.5, 1.5, 0.0, 2.2], dtype=torch.float64, device=DEVICE)
    expected = gradients((coefficient_N * reference.linear_logprob(*case)).sum(), case)
    d_hidden_ND, d_weight_VD = gradients(record.loss, case)
    assert torch.all(d_hidden_ND[[0, 3]] == 0) and torch.all(d_hidden_ND[[1, 2, 4]] != 0)
    assert relative(d_hidden_ND, expected[0]) < 1e-12 and relative(d_weight_VD, expected[1]) < 1e-12


@pytest.mark.parametrize("logp_old", [True, False])
def test_stale_rollouts_are_weighted_by_a_truncated_constant(logp_old):
    case = problem(2 * CHUNK + 3, 77)
    terms = policy_terms(case) if logp_old else replace(policy_terms(case), logp_old_N=None)
    logp_N = reference.linear_logprob(*case).detach()
    ratio_N = torch.linspace(0.2, 3.0, len(logp_N), dtype=torch.float64, device=DEVICE)
    stale = replace(terms, logp_rollout_N=logp_N - ratio_N.log())
    idle_N = (terms.pg_weight_N == 0) & (terms.kl_weight_N == 0)
    stale = with_fields(stale, idle_N, logp_rollout_N=float("nan"))
    before_N = ratio_N if not logp_old else ratio_N * (terms.logp_old_N - logp_N).exp()
    pg_weight_N = before_N.clamp(max=1.5) * terms.pg_weight_N
    by_hand = replace(terms, pg_weight_N=pg_weight_N, kl_weight_N=ratio_N.clamp(max=1.5) * terms.kl_weight_N)
    expected = reference.linear_policy_loss(*case, by_hand, **CLIP)
    d_expected = gradients(expected.loss, case)
    for function in (linear_policy_loss, reference.linear_policy_loss):
        actual = function(*case, stale, **CLIP, importance_cap=1.5)
        assert_same_record(actual, expected, 1e-12)
        for a, b in zip(gradients(actual.loss, case), d_expected, strict=True):
            assert relative(a, b) < 1e-12


@pytest.mark.parametrize("resident", [2, 64])
@pytest.mark.parametrize("change", [bounded, lambda terms: coupled(bounded(terms))], ids=["tokens", "sequences"])
def test_rows_without_weight_cannot_leak(change, resident):
    case, numbers = problem(9, 77), {**CLIP, "kl_clamp": 0.5, "budget": small_chunks(77, tokens=resident)}
    terms = change(policy_terms(case))
    idle_N = (terms.pg_weight_N == 0) & (terms.kl_weight_N == 0)
    assert idle_N.sum() == 2
    nan = float("nan")
    bounds = {"ratio_low_N": nan, "ratio_high_N": nan}
    poisoned = with_fields(terms, idle_N, logp_old_N=nan, logp_teacher_N=nan, advantage_N=nan)
    poisoned = with_fields(poisoned, terms.pg_weight_N == 0, logp_old_N=nan, advantage_N=nan, **bounds)
    poisoned = with_fields(poisoned, terms.kl_weight_N == 0, logp_teacher_N=nan)
    target_N = torch.where(idle_N, -100, case.target_N)
    dirty = Problem(case.hidden_ND, case.weight_VD, target_N).to(torch.float64)
    with torch.no_grad():
        dirty.hidden_ND[idle_N] = nan
    clean_record = linear_policy_loss(*case, terms, **numbers)
    record = linear_policy_loss(*dirty, poisoned, **numbers)
    assert_same_record(record, clean_record, 0.0)
    assert torch.all(record.logp_N[idle_N] == 0) and torch.all(record.entropy_N[idle_N] == 0)
    d_hidden_ND, d_weight_VD = gradients(record.loss, dirty)
    expected = gradients(clean_record.loss, case)
    assert torch.all(d_hidden_ND[idle_N] == 0)
    assert torch.equal(d_hidden_ND, expected[0]) and torch.equal(d_weight_VD, expected[1])


def test_a_batch_without_any_weight_costs_no_matmul():
    case = problem(5, 77)
    terms = with_fields(policy_terms(case), slice(None), pg_weight_N=0.0, kl_weight_N=0.0)
    with Recorder() as recorder:
        record = linear_policy_loss(*case, terms, **CLIP)
        record.loss.backward()
    assert recorder.matmuls == 0 and record.loss == 0
    assert torch.all(case.hidden_ND.grad == 0) and torch.all(case.weight_VD.grad == 0)


def test_a_missing_teacher_is_an_error_only_where_it_has_weight():
    case = problem(9, 77)
    terms = replace(policy_terms(case), logp_teacher_N=None)
    assert linear_policy_loss(*case, terms, **CLIP).loss.isnan()
    no_kl = with_fields(terms, slice(None), kl_weight_N=0.0)
    actual, expected = (f(*case, no_kl, **CLIP) for f in (linear_policy_loss, reference.linear_policy_loss))
    assert_same_record(actual, expected, 1e-12)
    assert actual.loss != 0


def test_the_gradient_depends_on_the_teacher():
    case = problem(9, 77)
    terms = policy_terms(case)
    moved = replace(terms, logp_teacher_N=terms.logp_teacher_N + 1)
    a, b = (gradients(linear_policy_loss(*case, t, **CLIP).loss, case)[0] for t in (terms, moved))
    assert relative(a, b) > 0.1


def test_at_ratio_one_it_is_grpo_with_a_shifted_advantage():
    """The identity of the formulas: L = −(A + w (logp_teacher − logp)) · logp has the same gradient."""
    case = problem(9, 77)
    terms = replace(policy_terms(case), logp_old_N=None)
    terms = with_fields(terms, slice(None), pg_weight_N=1.0)
    gap_N = terms.logp_teacher_N - reference.linear_logprob(*case).detach()
    shifted = replace(terms, advantage_N=terms.advantage_N + terms.kl_weight_N * gap_N, logp_teacher_N=None)
    shifted = with_fields(shifted, slice(None), kl_weight_N=0.0)
    actual, expected = (gradients(linear_policy_loss(*case, t, **CLIP).loss, case) for t in (terms, shifted))
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12


def test_a_frozen_side_has_no_gradient_and_costs_no_matmul():
    case = problem(CHUNK, 77)
    terms = policy_terms(case)
    both = gradients(linear_policy_loss(*case, terms, **CLIP).loss, case)
    counts = {}
    for frozen in ((), (0,), (1,), (0, 1)):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(case.leaves)]
        with Recorder() as recorder:
            loss = linear_policy_loss(*leaves, case.target_N, terms, **CLIP).loss
        counts[frozen] = recorder.matmuls
        assert loss.requires_grad == (len(frozen) < 2)
        if loss.requires_grad:
            loss.backward()
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, both[i])
    assert counts == {(): 3, (0,): 2, (1,): 2, (0, 1): 1}
    with Recorder() as recorder, torch.no_grad():
        linear_policy_loss(*case, terms, **CLIP)
    assert recorder.matmuls == 1


def test_hidden_need_not_be_contiguous():
    case = problem(CHUNK + 1, 77)
    terms = policy_terms(case)
    strided = Problem(case.hidden_ND.detach().T.contiguous().T.requires_grad_(), case.weight_VD, case.target_N)
    assert not strided.hidden_ND.is_contiguous()
    actual = gradients(linear_policy_loss(*strided, terms, **CLIP).loss, strided)
    for a, b in zip(actual, gradients(linear_policy_loss(*case, terms, **CLIP).loss, case), strict=True):
        assert relative(a, b) < 1e-12


def test_chunks_change_nothing_but_rounding_and_runs_are_bit_equal():
    case = problem(11, 77)
    terms = policy_terms(case)
    records = [
        linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(77, tokens=tokens)) for tokens in (4, 4, 1, 64)
    ]
    outputs = [(record.loss, record.logp_N, *gradients(FACTOR * record.loss, case)) for record in records]
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[1], strict=True))
    for record, output in zip(records[2:], outputs[2:], strict=True):
        assert_same_record(record, records[0], 1e-12)
        for a, b in zip(output, outputs[0], strict=True):
            assert_near(a, b, 1e-12)


def test_bfloat16_logits_serve_the_old_and_the_new_log_prob_alike():
    case = problem(9, 1000, width=32, dtype=torch.bfloat16)
    budget = replace(small_chunks(1000), bf16_logits=True)
    terms = replace(policy_terms(case), logp_old_N=linear_logprob(*case, budget=budget).detach())
    record = linear_policy_loss(*case, terms, **CLIP, budget=budget)
    assert record.kl_old.abs() <= 1e-5 and record.clip_count_low + record.clip_count_high == 0
    has_weight_N = (terms.pg_weight_N != 0) | (terms.kl_weight_N != 0)
    assert_near(record.logp_N[has_weight_N], terms.logp_old_N[has_weight_N], 1e-6)
    exact = gradients(linear_policy_loss(*case, terms, **CLIP).loss, case)
    for a, b in zip(gradients(record.loss, case), exact, strict=True):
        assert 0 < relative(a, b) < 3e-2


@pytest.mark.parametrize("total", [0, 1, 100, 441, 442, 2048, 3456, 8192, 131072])
@pytest.mark.parametrize("resident_bytes", [256 << 20, 2 << 30, 1])
def test_chunks_are_as_few_as_fit_and_about_equal(resident_bytes, total):
    most = max(1, min(resident_bytes // (151936 * 4), 8192))
    tokens = ChunkBudget(resident_bytes).resident_tokens(151936, 4, total)
    sizes = [part.stop - part.start for part in slices(total, tokens)]
    assert 1 <= tokens <= most and len(sizes) == -(-total // most)
    assert not sizes or max(sizes) - sizes[-1] < 128 * len(sizes)


def readme_block(name: str) -> str:
    """The code of kernels/README.md whose fence is marked `python NAME`."""
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    return re.search(rf"```python {name}\n(.*?)```", readme, re.S).group(1)


def test_the_readme_after_equals_before():
    case = problem(9, 77)
    logp_old, mask = policy_terms(case).logp_old_N, (torch.arange(9, device=DEVICE) % 4 != 1).double()
    names = {"target": case.target_N, "logp_old": logp_old, "advantage": torch.randn(9, device=DEVICE).double()}
    names |= {"weight": mask / mask.sum(), "torch": torch}
    results = []
    for block in ("before", "after"):
        lm_head = torch.nn.Linear(6, 77, bias=False, device=DEVICE)
        lm_head.weight = torch.nn.Parameter(case.weight_VD.detach().float())
        hidden = case.hidden_ND.detach().float().requires_grad_()
        scope = names | {"lm_head": lm_head, "hidden": hidden}
        exec(readme_block(block), globals(), scope)
        results.append((scope["loss"].detach(), hidden.grad, lm_head.weight.grad))
    for before, after in zip(*results, strict=True):
        assert relative(after, before) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="Liger's loss is plain torch")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_readme_in_ligers_shape_equals_liger(loss_type):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    torch.manual_seed(0)
    case = problem(15, 77, dtype=torch.float32)
    mask = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], device=DEVICE)
    old = (linear_logprob(*case).detach() + 0.3 * torch.randn(15, device=DEVICE)).view(3, 5)
    hidden, ids, advantages = case.hidden_ND.view(3, 5, -1), case.target_N.view(3, 5), torch.randn(3, device=DEVICE)
    theirs = liger.LigerFusedLinearGRPOLoss(0.0, False, False, loss_type=loss_type)(
        hidden, case.weight_VD, ids, mask, advantages, old_per_token_logps=old
    )[0]
    names = {"hidden": hidden, "weight": case.weight_VD, "ids": ids, "mask": mask, "logp_old": old}
    names |= {"advantages": advantages, "loss_type": loss_type, "torch": torch}
    exec(readme_block("liger"), globals(), names)
    assert theirs.abs() > 1e-2 and relative(names["loss"], theirs) < 1e-5
    for ours, expected in zip(gradients(names["loss"], case), gradients(theirs, case), strict=True):
        assert relative(ours, expected) < 1e-5


def test_backward_twice_gives_the_same_gradient_twice():
    case = problem(5, 77)
    loss = linear_policy_loss(*case, policy_terms(case), **CLIP).loss
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, case.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_padded_rows_of_the_vocabulary_are_minus_infinity():
    case = problem(9, 77)
    case = Problem(case.hidden_ND, case.weight_VD, case.target_N % 60)
    terms = policy_terms(Problem(case.hidden_ND, case.weight_VD[:60], case.target_N))
    actual = linear_policy_loss(*case, terms, **CLIP, vocab_size=60, budget=small_chunks(77))
    expected = reference.linear_policy_loss(*case, terms, **CLIP, vocab_size=60)
    assert_same_record(actual, expected, 1e-12)
    actual, expected = gradients(FACTOR * actual.loss, case), gradients(FACTOR * expected.loss, case)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12
    assert torch.all(actual[1][60:] == 0)


def test_no_tensor_is_as_large_as_the_logits():
    tokens, vocab, width = 64, 1000, 6
    case = problem(tokens, vocab, width=width, dtype=torch.float32)
    terms = policy_terms(case)
    with Recorder() as recorder:
        linear_policy_loss(*case, terms, **CLIP, budget=small_chunks(vocab, itemsize=4)).loss.backward()
    assert case.weight_VD.grad.abs().sum() > 0
    assert recorder.largest == 4 * max(vocab * width, CHUNK * vocab, tokens * width) < 4 * tokens * vocab / 10


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 4e-3)]
)
def test_main_grad_receives_dw_in_place(dtype, tolerance):
    case = problem(9, 77, dtype=dtype)

    def loss(**keywords) -> torch.Tensor:
        return linear_policy_loss(*case, policy_terms(case), **CLIP, budget=small_chunks(77), **keywords).loss

    d_hidden_ND, d_weight_VD = gradients(loss(), case)
    start_VD = torch.randn(77, 6, device=DEVICE).to(torch.promote_types(dtype, torch.float32))
    buffers = [start_VD.clone(), start_VD.clone()]
    for buffer_VD in buffers:
        for _microbatch in range(2):
            case.hidden_ND.grad = None
            loss(weight_main_grad=buffer_VD).backward()
            assert case.weight_VD.grad is None and torch.equal(case.hidden_ND.grad, d_hidden_ND)
    assert torch.equal(*buffers)
    assert relative(buffers[0] - start_VD, 2 * d_weight_VD) <= tolerance
    with pytest.raises(RuntimeError, match="scale the weights, not the loss"):
        (2 * loss(weight_main_grad=buffers[0])).backward()


def test_main_grad_is_written_only_for_a_weight_that_requires_grad():
    case = problem(3, 77)
    terms, main_grad_VD = policy_terms(case), torch.zeros(77, 6, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        linear_policy_loss(*case, terms, **CLIP, weight_main_grad=main_grad_VD)
    case.weight_VD.requires_grad_(False)
    linear_policy_loss(*case, terms, **CLIP, weight_main_grad=main_grad_VD).loss.backward()
    assert torch.all(main_grad_VD == 0) and case.hidden_ND.grad.abs().sum() > 0


def confident_case(tokens: int, vocab: int) -> Problem:
    """Each token's probability is in a few columns. Hidden is one-hot over tokens: dW are the dlogits."""
    torch.manual_seed(0)
    logits_NV = torch.randn(tokens, vocab, dtype=torch.float64)
    logits_NV.scatter_add_(1, torch.randint(0, vocab, (tokens, 5)), torch.full((tokens, 5), 9.0, dtype=torch.float64))
    eye_NN = torch.eye(tokens, dtype=torch.float64)
    target_N = logits_NV.topk(2).indices[:, 1]
    return Problem(eye_NN.to(DEVICE), logits_NV.T.contiguous().to(DEVICE), target_N.to(DEVICE)).to(torch.float64)


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.02])
def test_the_filtered_backward_measures_and_bounds_what_it_drops(eps, monkeypatch):
    case = confident_case(9, 1000)
    terms = policy_terms(case)
    exact = linear_policy_loss(*case, terms, **CLIP)
    exact_hidden_ND, dlogits_VN = gradients(exact.loss, case)
    columns, matmul = [], matmuls.weight_gradient_
    monkeypatch.setattr(
        matmuls, "weight_gradient_", lambda dw, dz, h, **how: (columns.append(dz.shape[1]), matmul(dw, dz, h, **how))
    )
    filtered = linear_policy_loss(*case, terms, **CLIP, filter_eps=eps)
    d_hidden_ND, d_weight_VN = gradients(filtered.loss, case)
    assert torch.equal(filtered.loss, exact.loss) and torch.equal(filtered.logp_N, exact.logp_N)
    assert exact.dropped_mass == 0 < filtered.dropped_mass <= eps * dlogits_VN.abs().sum() * (1 + 1e-12)
    assert_near((d_weight_VN - dlogits_VN).abs().sum(), filtered.dropped_mass, 1e-12)
    assert len(columns) == 1 and (d_weight_VN != 0).any(dim=1).sum() == columns[0] <= 1000 * (
        0.05 if eps > 0.02 else 0.5
    )
    longest = case.weight_VD.norm(dim=1).max()
    assert 0 < (d_hidden_ND - exact_hidden_ND).norm() <= filtered.dropped_mass * longest
    again = linear_policy_loss(*case, terms, **CLIP, filter_eps=eps)
    assert torch.equal(again.dropped_mass, filtered.dropped_mass)
    assert all(torch.equal(a, b) for a, b in zip(gradients(again.loss, case), (d_hidden_ND, d_weight_VN), strict=True))


def test_the_filtered_backward_over_chunks_and_into_main_grad():
    case = confident_case(9, 1000)
    terms, budget = policy_terms(case), small_chunks(1000, tokens=2)
    main_grad_VN = torch.zeros_like(case.weight_VD, requires_grad=False)
    exact = gradients(linear_policy_loss(*case, terms, **CLIP).loss, case)
    record = linear_policy_loss(*case, terms, **CLIP, budget=budget, filter_eps=0.1)
    filtered = gradients(record.loss, case)
    assert_near((filtered[1] - exact[1]).abs().sum(), record.dropped_mass, 1e-12)
    assert 0 < record.dropped_mass <= 0.1 * exact[1].abs().sum()
    keywords = {"budget": budget, "filter_eps": 0.1, "weight_main_grad": main_grad_VN}
    linear_policy_loss(*case, terms, **CLIP, **keywords).loss.backward()
    assert torch.equal(main_grad_VN, filtered[1]) and torch.equal(case.hidden_ND.grad, filtered[0])


def test_the_filter_is_exact_where_every_column_matters_or_none_does():
    case = problem(9, 77)
    terms = policy_terms(case)
    none = with_fields(terms, slice(None), advantage_N=0.0, kl_weight_N=0.0)
    for each in (terms, none):
        records = [linear_policy_loss(*case, each, **CLIP, filter_eps=eps) for eps in (0.0, 1e-6)]
        assert records[1].dropped_mass == 0
        for a, b in zip(*(gradients(record.loss, case) for record in records), strict=True):
            assert_near(a, b, 1e-12)


@pytest.mark.parametrize("shape", ["equal", "one", "decaying", "zero"])
@pytest.mark.parametrize("eps", [1e-6, 0.01, 0.5])
def test_the_threshold_never_drops_more_than_its_share(shape, eps):
    for columns in (1, 77, 5000):
        mass_U = {
            "equal": torch.ones(columns),
            "one": torch.zeros(columns).index_fill_(0, torch.tensor([0]), 1.0),
            "decaying": torch.exp(-0.1 * torch.arange(columns)),
            "zero": torch.zeros(columns),
        }[shape].to(DEVICE)
        dropped_U = mass_U < filter_threshold(mass_U, eps)
        assert mass_U[dropped_U].sum() <= eps * mass_U.sum() and (mass_U.sum() == 0) == (not mass_U[~dropped_U].any())
        if shape == "decaying" and columns == 5000:
            assert dropped_U.sum() > 4800


def test_mistakes_are_named():
    case = problem(5, 77)
    terms = policy_terms(case)
    with pytest.raises(ValueError, match=r"terms.advantage_N is \(4,\)"):
        linear_policy_loss(*case, replace(terms, advantage_N=terms.advantage_N[:4]), **CLIP)
    with pytest.raises(ValueError, match=r"clip_eps_low is -0.1"):
        linear_policy_loss(*case, terms, clip_eps_low=-0.1, clip_eps_high=0.2)
    with pytest.raises(ValueError, match="importance_cap is 0"):
        linear_policy_loss(*case, terms, **CLIP, importance_cap=0.0)
    with pytest.raises(
        ValueError, match=r"weight_main_grad is torch.float32 \(77, 6\) on .*; it must be torch.float64"
    ):
        linear_policy_loss(*case, terms, **CLIP, weight_main_grad=torch.zeros(77, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"filter_eps is 1; it must lie in \[0, 1\)"):
        linear_policy_loss(*case, terms, **CLIP, filter_eps=1)
