"""linear_kl against the specification. The same file runs in plain torch, interpreted and on a GPU."""

import math
from itertools import pairwise

import pytest
import torch
from kernel_cases import (
    CHUNK,
    DEVICE,
    INTERPRETED,
    PairProblem,
    Recorder,
    assert_near,
    gradients,
    pair_problem,
    relative,
    small_chunks,
    token_weights,
)

from vold_kernels import ChunkBudget, linear_kl, pairs, reference
from vold_kernels.divergence import Divergence
from vold_kernels.softmax import dlogits_storage

FACTOR = -1.7  # the upstream gradient of the loss
KINDS = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "alpha": 0.1},
]
TOPS = [{"top_k": top_k} for top_k in (None, 1, 5, 76, 77, 100)]


def pair_chunks(vocab: int, *, itemsize: int = 8, tokens: int = CHUNK) -> ChunkBudget:
    """`tokens` rows of both heads resident."""
    return small_chunks(vocab, itemsize=itemsize, tokens=2 * tokens)


def name(keywords: dict) -> str:
    return " ".join(str(value) for value in keywords.values())


@pytest.mark.parametrize("top", TOPS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_float64_equals_the_specification(kind, top):
    for tokens, vocab, temperature in ((1, 77, 1.0), (2 * CHUNK + 3, 77, 0.7), (3, 5000, 1.3)):
        case, weight_N = pair_problem(tokens, vocab), token_weights(tokens)
        keywords = {**kind, **top, "weight_N": weight_N, "temperature": temperature}
        actual = linear_kl(*case, **keywords, budget=pair_chunks(vocab))
        expected = reference.linear_kl(*case, **keywords)
        assert expected.loss != 0 and actual.loss.dtype == torch.float64 and not actual.kl_N.requires_grad
        assert_near(actual.loss, expected.loss, 1e-12)
        assert_near(actual.kl_N, expected.kl_N, 1e-12)
        assert torch.all(actual.kl_N[weight_N == 0] == 0) and torch.all(actual.kl_N[weight_N != 0] > 0)
        actual, expected = (gradients(FACTOR * record.loss, case) for record in (actual, expected))
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b) < 1e-12
            assert_near(a, b, 1e-12)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_gradcheck(kind, top_k):
    case, weight_N = pair_problem(3, 11, width=2), torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64, device=DEVICE)

    def loss(hidden_ND, weight_VD):
        both = (hidden_ND, weight_VD, case.teacher_hidden_NE, case.teacher_weight_VE)
        keywords = {**kind, "top_k": top_k, "weight_N": weight_N, "temperature": 0.8}
        return FACTOR * linear_kl(*both, **keywords, budget=pair_chunks(11, tokens=2)).loss

    assert torch.autograd.gradcheck(loss, case.leaves)


def test_the_definitions_by_hand():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    logits = [x.double().log()[:, None].to(DEVICE) for x in (p, q)]
    one = torch.ones(1, 1, dtype=torch.float64, device=DEVICE)

    def value(**keywords) -> float:
        return linear_kl(one, logits[0], one, logits[1], weight_N=one[0], **keywords).kl_N.item()

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a * (a / b).log()).sum().item()

    m = 0.3 * q + 0.7 * p
    assert value(divergence="reverse_kl") == pytest.approx(kl(p, q), rel=1e-6)
    assert value(divergence="forward_kl") == pytest.approx(kl(q, p), rel=1e-6)
    assert value(divergence="jsd", alpha=0.3) == pytest.approx(0.3 * kl(q, m) + 0.7 * kl(p, m), rel=1e-6)
    two = [torch.stack((x[0], x[1:].sum())) for x in (p, q)]
    assert value(divergence="reverse_kl", top_k=1) == pytest.approx(kl(*two), rel=1e-6)
    # The limits the documentation states.
    assert value(divergence="jsd", alpha=1e-7) / 1e-7 == pytest.approx(kl(q, p), rel=1e-5)
    assert value(divergence="jsd", alpha=1 - 1e-7) / 1e-7 == pytest.approx(kl(p, q), rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_a_teacher_equal_to_the_student_gives_exactly_nothing(kind, top_k):
    for dtype in (torch.float32, torch.float64):
        case = pair_problem(5, 1000, dtype=dtype)
        same = PairProblem(*case.leaves, *(x.detach() for x in case.leaves))
        weight_N = torch.ones(5, device=DEVICE)
        record = linear_kl(*same, **kind, top_k=top_k, weight_N=weight_N, budget=pair_chunks(1000, tokens=2))
        assert record.loss == 0 and torch.all(record.kl_N == 0)
        assert all(torch.all(gradient == 0) for gradient in gradients(record.loss, same))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_float32_is_within_5e_6(kind, top_k):
    case = pair_problem(9, 1000, width=16)
    case = PairProblem(*(x.detach() * 0.5**0.5 for x in case)).to(torch.float32)
    exact_case, weight_N = case.to(torch.float64), token_weights(9)
    actual = linear_kl(*case, **kind, top_k=top_k, weight_N=weight_N, budget=pair_chunks(1000, itemsize=4))
    expected = reference.linear_kl(*exact_case, **kind, top_k=top_k, weight_N=weight_N)
    assert actual.loss.dtype == torch.float32
    assert_near(actual.loss, expected.loss, 5e-6)
    assert_near(actual.kl_N, expected.kl_N, 5e-6)
    actual, expected = gradients(FACTOR * actual.loss, case), gradients(FACTOR * expected.loss, exact_case)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 5e-6


def test_bfloat16_inputs_err_less_than_eager_bfloat16():
    case = pair_problem(12, 1000, width=32, dtype=torch.bfloat16)
    exact_case, weight_N = case.to(torch.float64), token_weights(12)
    logp, logq = ((h @ w.T).log_softmax(-1) for h, w in (tuple(case)[:2], tuple(case)[2:]))
    eager = (weight_N.float() * (logp.exp() * (logp - logq)).sum(-1).float()).sum()
    actual = linear_kl(*case, weight_N=weight_N)
    expected = reference.linear_kl(*exact_case, weight_N=weight_N)
    error, eager_error = (abs(x.item() - expected.loss.item()) for x in (actual.loss, eager))
    assert error < 1e-4 and error < eager_error / 10
    ours, exact = gradients(FACTOR * actual.loss, case), gradients(FACTOR * expected.loss, exact_case)
    for a, b, e, bound in zip(ours, exact, gradients(FACTOR * eager, case), (4e-3, 3e-3), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) <= max(bound, 1.25 * relative(e, b))


@pytest.mark.parametrize("top_k", [None, 100])
def test_the_real_vocabulary(top_k):
    case = pair_problem(2, 151936, width=4, dtype=torch.float32)
    exact_case, weight_N = case.to(torch.float64), torch.tensor([1.0, -0.5], device=DEVICE)
    keywords = {"divergence": "jsd", "top_k": top_k, "weight_N": weight_N}
    actual, expected = linear_kl(*case, **keywords), reference.linear_kl(*exact_case, **keywords)
    assert_near(actual.kl_N, expected.kl_N, 5e-6)
    eager = gradients(reference.linear_kl(*case, **keywords).loss, case)
    actual, expected = gradients(actual.loss, case), gradients(expected.loss, exact_case)
    for a, b, e in zip(actual, expected, eager, strict=True):
        assert relative(a, b) <= max(5e-6, 1.25 * relative(e, b))


def adversarial() -> PairProblem:
    """Heads with these logits (hidden is one-hot over tokens): equal ones, spikes apart and together, −1e4 everywhere,
    a student who is certain of what the teacher excludes."""
    torch.manual_seed(0)
    logits_SNV = torch.randn(2, 6, 1000)
    logits_SNV[:, 0] = torch.tensor([30.0, -1e4])[:, None]
    logits_SNV[:, 1, 5] = 80.0
    logits_SNV[0, 2, 5], logits_SNV[1, 2, 6] = 80.0, 80.0
    logits_SNV[0, 3] -= 1e4
    logits_SNV[0, 4, 7] = 1e4
    logits_SNV[1, 5, :500] = -1e4
    eye_NN = torch.eye(6)
    return PairProblem(*(x.to(DEVICE) for x in (eye_NN, logits_SNV[0].T, eye_NN, logits_SNV[1].T))).to(torch.float32)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_adversarial_rows(kind, top_k):
    case = adversarial()
    exact_case, weight_N = case.to(torch.float64), torch.ones(6, device=DEVICE)
    actual = linear_kl(*case, **kind, top_k=top_k, weight_N=weight_N)
    expected = reference.linear_kl(*exact_case, **kind, top_k=top_k, weight_N=weight_N)
    assert_near(actual.kl_N, expected.kl_N, 2e-6)
    assert abs(actual.kl_N[0].item()) < 1e-6 and expected.kl_N[2] > 0.3
    if kind["divergence"] == "jsd":
        assert torch.all(actual.kl_N <= math.log(2) + 1e-6)
    (d_hidden_ND, d_weight_VD), (_, exact_VD) = gradients(actual.loss, case), gradients(expected.loss, exact_case)
    assert d_hidden_ND.isfinite().all()
    assert relative(d_weight_VD, exact_VD) < 5e-6  # hidden is one-hot: these are the dlogits themselves


def test_buckets_never_exceed_the_full_divergence():
    case, weight_N = pair_problem(9, 77), torch.ones(9, device=DEVICE)
    for kind in KINDS:
        values = [linear_kl(*case, **kind, top_k=top_k, weight_N=weight_N).kl_N for top_k in (1, 5, 40, 77, None)]
        for coarse_N, fine_N in pairwise(values):
            assert torch.all(coarse_N <= fine_N + 1e-12)
        assert_near(values[-2], values[-1], 1e-12)
        assert torch.all(values[0] < 0.9 * values[-1])


@pytest.mark.parametrize("top_k", [None, 5])
def test_rows_without_weight_cannot_leak(top_k):
    case, weight_N = pair_problem(9, 77), token_weights(9)
    dirty = case.to(torch.float64)
    with torch.no_grad():
        dirty.student_hidden_ND[weight_N == 0] = float("nan")
        dirty.teacher_hidden_NE[weight_N == 0] = float("inf")
    clean, record = (linear_kl(*x, weight_N=weight_N, top_k=top_k) for x in (case, dirty))
    assert torch.equal(clean.loss, record.loss) and torch.equal(clean.kl_N, record.kl_N)
    assert record.loss != 0 and torch.all(record.kl_N[weight_N == 0] == 0)
    actual, expected = gradients(record.loss, dirty), gradients(clean.loss, case)
    assert torch.all(actual[0][weight_N == 0] == 0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_batch_without_any_weight_costs_no_matmul():
    case = pair_problem(5, 77)
    with Recorder() as recorder:
        record = linear_kl(*case, weight_N=torch.zeros(5, device=DEVICE))
        record.loss.backward()
    assert recorder.matmuls == 0 and record.loss == 0
    assert torch.all(case.student_hidden_ND.grad == 0) and torch.all(case.student_weight_VD.grad == 0)


def test_a_frozen_side_has_no_gradient_and_costs_no_matmul():
    case, weight_N = pair_problem(CHUNK, 77), torch.ones(CHUNK, device=DEVICE)
    both = gradients(linear_kl(*case, weight_N=weight_N).loss, case)
    counts = {}
    for frozen in ((), (0,), (1,), (0, 1)):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(case)]
        with Recorder() as recorder:
            loss = linear_kl(*leaves, weight_N=weight_N).loss
        counts[frozen] = recorder.matmuls
        assert loss.requires_grad == (len(frozen) < 2)
        if loss.requires_grad:
            loss.backward()
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i in frozen or i > 1 else torch.equal(leaf.grad, both[i])
    assert counts == {(): 4, (0,): 3, (1,): 3, (0, 1): 2}


@pytest.mark.parametrize("top_k", [None, 5])
def test_chunks_change_nothing_but_rounding_and_runs_are_bit_equal(top_k):
    case, weight_N = pair_problem(11, 77), token_weights(11)
    outputs = []
    for tokens in (4, 4, 1, 64):
        record = linear_kl(*case, weight_N=weight_N, top_k=top_k, budget=pair_chunks(77, tokens=tokens))
        outputs.append((record.loss, record.kl_N, *gradients(FACTOR * record.loss, case)))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[1], strict=True))
    for other in outputs[2:]:
        for a, b in zip(other, outputs[0], strict=True):
            assert_near(a, b, 1e-12)


def test_hidden_need_not_be_contiguous():
    case, weight_N = pair_problem(CHUNK + 1, 77), token_weights(CHUNK + 1)
    hidden_ND, teacher_hidden_NE = (x.detach().T.contiguous().T for x in (case.student_hidden_ND, tuple(case)[2]))
    assert not hidden_ND.is_contiguous() and not teacher_hidden_NE.is_contiguous()
    strided = PairProblem(hidden_ND.requires_grad_(), case.student_weight_VD, teacher_hidden_NE, case.teacher_weight_VE)
    actual, expected = (gradients(linear_kl(*x, weight_N=weight_N).loss, x) for x in (strided, case))
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("top_k", [None, 5, 70])
def test_ids_that_are_not_shared_are_minus_infinity(top_k):
    case, weight_N = pair_problem(9, 77), token_weights(9)
    wider = PairProblem(*tuple(case)[:3], torch.cat((case.teacher_weight_VE, case.teacher_weight_VE)))
    for student_and_teacher in (case, wider):
        keywords = {"weight_N": weight_N, "top_k": top_k, "vocab_size": 60}
        actual = linear_kl(*student_and_teacher, **keywords, budget=pair_chunks(77))
        expected = reference.linear_kl(*student_and_teacher, **keywords)
        assert_near(actual.kl_N, expected.kl_N, 1e-12)
        actual, expected = (gradients(FACTOR * record.loss, case) for record in (actual, expected))
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b) < 1e-12
        assert torch.all(actual[1][60:] == 0)


@pytest.mark.skipif(not INTERPRETED and DEVICE != "cuda", reason="only the Triton row function narrows")
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_narrow_dlogits_overwrite_the_logits_without_reading_what_they_wrote(kind):
    torch.manual_seed(0)
    z_CU, t_CU = torch.randn(2, 3, 5000).to(DEVICE)
    real_columns, divergence = torch.tensor(4997).to(DEVICE), Divergence(kind["divergence"], kind.get("alpha", 0.5))
    normaliser_4C = torch.zeros(4, 3, device=DEVICE) + torch.tensor([4.0, 5.0, 4.5, 5.0], device=DEVICE)[:, None]
    mean_log_ratio_C, weight_C = torch.rand(2, 3).to(DEVICE)
    dlogits_ = pairs.pair_functions(z_CU.device).divergence_dlogits_
    wide_CU, narrow_CU = torch.empty_like(z_CU), dlogits_storage(z_CU, torch.bfloat16)
    for dz_CU in (wide_CU, narrow_CU):
        dlogits_(dz_CU, z_CU, t_CU, real_columns, normaliser_4C, mean_log_ratio_C, weight_C, divergence)
    assert narrow_CU.data_ptr() == z_CU.data_ptr() and torch.all(narrow_CU[:, -3:] == 0) and wide_CU.abs().sum() > 0
    assert torch.all((narrow_CU.float() - wide_CU).abs() <= wide_CU.abs() / 128)  # the interpreter truncates


def test_no_tensor_is_as_large_as_the_logits():
    tokens, vocab, width = 64, 1000, 6
    case = pair_problem(tokens, vocab, width=width, dtype=torch.float32)
    for top_k in (None, 20):
        case.student_weight_VD.grad = None
        with Recorder() as recorder:
            weight_N = torch.ones(tokens, device=DEVICE)
            record = linear_kl(*case, weight_N=weight_N, top_k=top_k, budget=pair_chunks(vocab, itemsize=4))
            record.loss.backward()
        assert case.student_weight_VD.grad.abs().sum() > 0
        assert recorder.largest == 4 * vocab * (width + 3) < 4 * tokens * vocab / 6  # a view of the teacher's weight


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 4e-3)]
)
def test_main_grad_receives_dw_in_place(dtype, tolerance):
    case = pair_problem(9, 77, dtype=dtype)

    def loss(**keywords) -> torch.Tensor:
        return linear_kl(*case, weight_N=token_weights(9), budget=pair_chunks(77), **keywords).loss

    d_hidden_ND, d_weight_VD = gradients(loss(), case)
    start_VD = torch.randn(77, 6, device=DEVICE).to(torch.promote_types(dtype, torch.float32))
    buffers = [start_VD.clone(), start_VD.clone()]
    for buffer_VD in buffers:
        for _microbatch in range(2):
            case.student_hidden_ND.grad = None
            loss(weight_main_grad=buffer_VD).backward()
            assert case.student_weight_VD.grad is None and torch.equal(case.student_hidden_ND.grad, d_hidden_ND)
    assert torch.equal(*buffers)
    assert relative(buffers[0] - start_VD, 2 * d_weight_VD) <= tolerance
    with pytest.raises(RuntimeError, match="scale the weights, not the loss"):
        (2 * loss(weight_main_grad=buffers[0])).backward()


def test_main_grad_is_written_only_for_a_weight_that_requires_grad():
    case, weight_N = pair_problem(3, 77), token_weights(3)
    main_grad_VD = torch.zeros(77, 6, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        linear_kl(*case, weight_N=weight_N, weight_main_grad=main_grad_VD)
    case.student_weight_VD.requires_grad_(False)
    linear_kl(*case, weight_N=weight_N, weight_main_grad=main_grad_VD).loss.backward()
    assert torch.all(main_grad_VD == 0) and case.student_hidden_ND.grad.abs().sum() > 0


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_filtered_backward_measures_and_bounds_what_it_drops(top_k):
    case = adversarial().to(torch.float64)
    weight_N = torch.ones(6, device=DEVICE)
    weight_N[5] = 0  # the one row whose gradient is spread over the columns
    exact, filtered = (
        linear_kl(*case, weight_N=weight_N, divergence="jsd", top_k=top_k, filter_eps=eps) for eps in (0.0, 0.6)
    )
    assert torch.equal(exact.kl_N, filtered.kl_N)
    (exact_hidden_ND, dlogits_VN), (d_hidden_ND, d_weight_VN) = (gradients(r.loss, case) for r in (exact, filtered))
    assert exact.dropped_mass == 0 < filtered.dropped_mass <= 0.6 * dlogits_VN.abs().sum()
    assert_near((d_weight_VN - dlogits_VN).abs().sum(), filtered.dropped_mass, 1e-12)
    longest = case.student_weight_VD.norm(dim=1).max()
    assert 0 < (d_hidden_ND - exact_hidden_ND).norm() <= filtered.dropped_mass * longest


def test_mistakes_are_named():
    case, weight_N = tuple(pair_problem(5, 77)), torch.ones(5, device=DEVICE)
    with pytest.raises(ValueError, match=r"hidden is \(5, 8\) and weight \(77, 9\)"):
        linear_kl(*case[:2], case[2][:, :8], case[3], weight_N=weight_N)
    with pytest.raises(ValueError, match=r"student_hidden has 5 rows and teacher_hidden 4"):
        linear_kl(*case[:2], case[2][:4], case[3], weight_N=weight_N)
    with pytest.raises(ValueError, match=r"77 rows and teacher_weight 70, vocab_size is None; .* at most 70"):
        linear_kl(*case[:3], case[3][:70], weight_N=weight_N)
    with pytest.raises(ValueError, match=r"the student's head is torch.float64 .* teacher's torch.float32"):
        linear_kl(*case[:2], case[2].float(), case[3].float(), weight_N=weight_N)
    with pytest.raises(ValueError, match="divergence is 'kl'; it must be one of reverse_kl, forward_kl, jsd"):
        linear_kl(*case, weight_N=weight_N, divergence="kl")
    with pytest.raises(ValueError, match=r"alpha is 1; it must lie inside \(0, 1\)"):
        linear_kl(*case, weight_N=weight_N, divergence="jsd", alpha=1)
    with pytest.raises(ValueError, match="top_k is 0"):
        linear_kl(*case, weight_N=weight_N, top_k=0)
    with pytest.raises(ValueError, match=r"weight_N is \(4,\)"):
        linear_kl(*case, weight_N=weight_N[:4])
    with pytest.raises(
        ValueError, match=r"weight_main_grad is torch.float32 \(77, 6\) on .*; it must be torch.float64"
    ):
        linear_kl(*case, weight_N=weight_N, weight_main_grad=torch.zeros(77, 6, device=DEVICE))
