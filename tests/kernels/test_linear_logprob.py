"""linear_logprob against the specification. The same file runs in plain torch, through the interpreter and on a GPU."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CHUNK,
    DEVICE,
    INTERPRETED,
    Problem,
    Recorder,
    assert_near,
    gradients,
    problem,
    relative,
    small_chunks,
)

from vold_kernels import linear_logprob, reference, rows, softmax


def upstream(*outputs: torch.Tensor) -> torch.Tensor:
    """Σ random · output, reproducibly."""
    generator = torch.Generator().manual_seed(7)
    factors = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return sum((factor * x).sum() for factor, x in zip(factors, outputs, strict=True))


def test_the_backend_under_test_is_the_one_we_mean():
    name = rows.row_functions(torch.device(DEVICE)).__name__
    assert name.endswith("rows_triton" if INTERPRETED or DEVICE == "cuda" else "rows_torch")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 77), (CHUNK + 1, 77), (CHUNK, 1000), (3, 5000)])
def test_float64_equals_the_specification(tokens, vocab, temperature):
    case = problem(tokens, vocab)
    keywords = {"temperature": temperature, "return_entropy": True}
    actual = linear_logprob(*case, **keywords, budget=small_chunks(vocab, columns=max(16, vocab // 3)))
    expected = reference.linear_logprob(*case, **keywords)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64
        assert_near(a, b, 1e-12)
    for a, b in zip(gradients(upstream(*actual), case), gradients(upstream(*expected), case), strict=True):
        assert relative(a, b) < 1e-12
        assert_near(a, b, 1e-12)


def test_logprob_alone_and_entropy_alone_have_their_own_gradients():
    case = problem(CHUNK + 1, 77)
    for pick in (0, 1):
        actual = gradients(upstream(linear_logprob(*case, return_entropy=True)[pick]), case)
        expected = gradients(upstream(reference.linear_logprob(*case, return_entropy=True)[pick]), case)
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b) < 1e-12
    assert torch.equal(linear_logprob(*case), linear_logprob(*case, return_entropy=True)[0])


def test_gradcheck():
    case = problem(3, 19, width=3)

    def both(hidden_ND, weight_VD):
        budget = small_chunks(19, tokens=2)
        return linear_logprob(hidden_ND, weight_VD, case.target_N, temperature=0.8, return_entropy=True, budget=budget)

    assert torch.autograd.gradcheck(both, case.leaves)


def test_float32_is_within_5e_6():
    case = problem(CHUNK + 1, 1000, width=16)
    case = Problem(case.hidden_ND, case.weight_VD.detach() * 0.5, case.target_N).to(torch.float32)
    actual = linear_logprob(*case, return_entropy=True, budget=small_chunks(1000, itemsize=4, columns=300))
    exact_case = case.to(torch.float64)
    expected = reference.linear_logprob(*exact_case, return_entropy=True)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, 5e-6)
    actual, expected = gradients(upstream(*actual), case), gradients(upstream(*expected), exact_case)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 5e-6


def test_bfloat16_inputs_err_less_than_eager_bfloat16():
    case = problem(9, 1000, width=32, dtype=torch.bfloat16)
    exact_case = case.to(torch.float64)
    with torch.no_grad():
        highest = (exact_case.hidden_ND @ exact_case.weight_VD.T).abs().max().item()
    expected = reference.linear_logprob(*exact_case)
    eager = (case.hidden_ND @ case.weight_VD.T).log_softmax(-1).gather(1, case.target_N[:, None])[:, 0]
    actual = linear_logprob(*case)
    assert actual.dtype == torch.float32
    error, eager_error = ((x.double() - expected).abs().max().item() for x in (actual, eager))
    assert error <= 2e-5 * (1 + highest / 16) and error < eager_error / 100
    ours, exact = gradients(upstream(actual), case), gradients(upstream(expected), exact_case)
    eagers = gradients(upstream(eager), case)
    for a, b, e, bound in zip(ours, exact, eagers, (4e-3, 3e-3), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) <= max(bound, 1.25 * relative(e, b))


def test_the_real_vocabulary():
    case = problem(2, 151936, width=4, dtype=torch.float32)
    actual = linear_logprob(*case, return_entropy=True)
    exact_case = case.to(torch.float64)
    expected = reference.linear_logprob(*exact_case, return_entropy=True)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 5e-6)
    eager = gradients(upstream(*reference.linear_logprob(*case, return_entropy=True)), case)
    actual, expected = gradients(upstream(*actual), case), gradients(upstream(*expected), exact_case)
    for a, b, e in zip(actual, expected, eager, strict=True):
        assert relative(a, b) <= max(5e-6, 1.25 * relative(e, b))


def from_logits(logits_NV: torch.Tensor, target_N: torch.Tensor) -> Problem:
    """A head whose logits are these: hidden is one-hot over tokens."""
    hidden_NN = torch.eye(len(logits_NV), dtype=logits_NV.dtype)
    return Problem(hidden_NN.to(DEVICE), logits_NV.T.contiguous().to(DEVICE), target_N.to(DEVICE)).to(logits_NV.dtype)


def test_rows_of_equal_logits():
    for level in (0.0, -1e4, 30.0):
        case = from_logits(torch.full((2, 1000), level), torch.tensor([0, 999]))
        logp_N, entropy_N = linear_logprob(*case, return_entropy=True)
        assert_near(logp_N, torch.full_like(logp_N, -math.log(1000)), 1e-6)
        assert_near(entropy_N, torch.full_like(entropy_N, math.log(1000)), 1e-6)


def test_one_spike_and_rows_far_below_zero():
    torch.manual_seed(0)
    logits_NV = torch.randn(3, 1000)
    logits_NV[0, 5], logits_NV[1, 5], logits_NV[2] = 80.0, 80.0, logits_NV[2] - 1e4
    case = from_logits(logits_NV, torch.tensor([5, 6, 7]))
    actual = linear_logprob(*case, return_entropy=True)
    exact_case = case.to(torch.float64)
    expected = reference.linear_logprob(*exact_case, return_entropy=True)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-6)
    assert actual[0][0] == 0 and torch.all(actual[0] <= 0) and torch.all(actual[1] >= 0)
    a, b = gradients(upstream(*actual), case)[1], gradients(upstream(*expected), exact_case)[1]
    assert relative(a, b) < 5e-6


def test_logprob_is_never_positive_and_entropy_never_negative():
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 8) * torch.logspace(-3, 2, 40)[:, None], torch.randn(77, 8)
    case = Problem(hidden_ND.to(DEVICE), weight_VD.to(DEVICE), (hidden_ND @ weight_VD.T).argmax(1).to(DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        logp_N, entropy_N = linear_logprob(*case.to(dtype), return_entropy=True)
        assert torch.all(logp_N <= 0) and torch.all(entropy_N >= 0) and logp_N.min() < -0.5


def test_a_frozen_side_has_no_gradient_and_costs_no_matmul():
    case = problem(CHUNK, 77)
    both = gradients(upstream(linear_logprob(*case)), case)
    counts = {}
    for frozen in (None, 0, 1):
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(case.leaves)]
        loss = upstream(linear_logprob(*leaves, case.target_N))
        with Recorder() as recorder:
            loss.backward()
        counts[frozen] = recorder.matmuls
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, both[i])
    assert counts == {None: 3, 0: 2, 1: 2}


def test_hidden_need_not_be_contiguous():
    case = problem(CHUNK + 1, 77)
    expected = gradients(upstream(linear_logprob(*case)), case)
    for wide in (case.hidden_ND.detach().repeat_interleave(2, 1)[:, ::2], case.hidden_ND.detach().T.contiguous().T):
        assert not wide.is_contiguous()
        strided = Problem(wide.requires_grad_(), case.weight_VD, case.target_N)
        actual = gradients(upstream(linear_logprob(*strided)), strided)
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b) < 1e-12


def test_chunks_change_nothing_but_rounding_and_runs_are_bit_equal():
    case = problem(11, 77)
    outputs = []
    one_by_one, at_once = small_chunks(77, tokens=1, columns=77), small_chunks(77, tokens=64)
    for budget in (small_chunks(77), small_chunks(77), one_by_one, at_once):
        logp_N, entropy_N = linear_logprob(*case, return_entropy=True, budget=budget)
        outputs.append((logp_N, entropy_N, *gradients(upstream(logp_N, entropy_N), case)))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[1], strict=True))
    for other in outputs[2:]:
        for a, b in zip(outputs[0], other, strict=True):
            assert_near(a, b, 1e-12)


def test_tiled_and_resident_folds_of_equal_logits_agree_to_the_bit():
    from vold_kernels.chunks import TILE_COLUMNS, slices

    torch.manual_seed(0)
    z_CU = torch.randn(2, 2 * TILE_COLUMNS + 333).to(DEVICE)
    target_C, real_columns = (
        torch.tensor([3, 2 * TILE_COLUMNS + 1]).to(DEVICE),
        torch.tensor(z_CU.shape[1] - 5).to(DEVICE),
    )
    functions = rows.row_functions(z_CU.device)
    tiled, resident = (softmax.empty_statistics(2, z_CU, z_CU.dtype) for _ in range(2))
    functions.fold_(resident, z_CU, target_C, real_columns, 0)
    for tile in slices(z_CU.shape[1], TILE_COLUMNS):
        functions.fold_(tiled, z_CU[:, tile].contiguous(), target_C, real_columns, tile.start)
    assert torch.equal(tiled, resident) and torch.all(resident[1] > 1)


@pytest.mark.skipif(not INTERPRETED and DEVICE != "cuda", reason="only the Triton row function narrows")
def test_narrow_dlogits_overwrite_the_logits_without_reading_what_they_wrote():
    torch.manual_seed(0)
    tokens, vocab = 3, 5000
    z_CU, real_columns = torch.randn(tokens, vocab).to(DEVICE), torch.tensor(vocab - 3).to(DEVICE)
    target_C, d_logp_C = torch.tensor([0, 4000, 4996]).to(DEVICE), torch.tensor([1.0, -2.0, 0.5]).to(DEVICE)
    folded_4C = softmax.empty_statistics(tokens, z_CU, z_CU.dtype)
    functions = rows.row_functions(z_CU.device)
    functions.fold_(folded_4C, z_CU, target_C, real_columns, 0)
    log_sum_C = folded_4C[1].log()
    statistics = softmax.SoftmaxStatistics(folded_4C[0], log_sum_C, folded_4C[3] - log_sum_C, log_sum_C)
    wide_CU = torch.empty_like(z_CU)
    functions.dlogits_(wide_CU, z_CU, target_C, real_columns, statistics, d_logp_C, None)
    narrow_CU = softmax.dlogits_storage(z_CU, torch.bfloat16)
    functions.dlogits_(narrow_CU, z_CU, target_C, real_columns, statistics, d_logp_C, None)
    assert narrow_CU.data_ptr() == z_CU.data_ptr() and torch.all(narrow_CU[:, -3:] == 0)
    assert torch.all((narrow_CU.float() - wide_CU).abs() <= wide_CU.abs() / 128)  # the interpreter truncates


@pytest.mark.skipif(not INTERPRETED and DEVICE != "cuda", reason="plain torch stores fp32 logits only")
def test_the_row_functions_take_bfloat16_logits():
    torch.manual_seed(0)
    z_CU, real_columns = torch.randn(3, 5000).to(DEVICE, torch.bfloat16), torch.tensor(4997).to(DEVICE)
    target_C, d_logp_C = torch.tensor([0, 4000, 4996]).to(DEVICE), torch.tensor([1.0, -2.0, 0.5]).to(DEVICE)
    functions, folded = rows.row_functions(z_CU.device), []
    for logits_CU in (z_CU, z_CU.float()):
        folded.append(softmax.empty_statistics(3, z_CU, torch.float32))
        functions.fold_(folded[-1], logits_CU, target_C, real_columns, 0)
    assert torch.equal(*folded) and torch.all(folded[0][1] > 1)
    log_sum_C = folded[0][1].log()
    statistics = softmax.SoftmaxStatistics(folded[0][0], log_sum_C, folded[0][3] - log_sum_C, log_sum_C)
    wide_CU = torch.empty(z_CU.shape, device=DEVICE)
    functions.dlogits_(wide_CU, z_CU.float(), target_C, real_columns, statistics, d_logp_C, None)
    functions.dlogits_(z_CU, z_CU, target_C, real_columns, statistics, d_logp_C, None)
    assert torch.all((z_CU.float() - wide_CU).abs() <= wide_CU.abs() / 128)  # the interpreter truncates


def test_bfloat16_logits_are_what_rounding_makes_of_them():
    case = problem(9, 1000, width=32, dtype=torch.bfloat16)
    budget = replace(small_chunks(1000), bf16_logits=True)
    logp_N, entropy_N = linear_logprob(*case, return_entropy=True, budget=budget)
    z_NV = (case.hidden_ND.float() @ case.weight_VD.float().T).bfloat16().double()
    expected = z_NV.log_softmax(-1)
    assert_near(logp_N.double(), expected.gather(1, case.target_N[:, None])[:, 0], 1e-5)
    assert_near(entropy_N.double(), -(expected.exp() * expected).sum(-1), 1e-5)
    assert (logp_N - linear_logprob(*case)).abs().max() > 1e-3 and torch.all(logp_N <= 0)
    exact = gradients(linear_logprob(*case).sum(), case)
    for a, b in zip(gradients(logp_N.sum(), case), exact, strict=True):
        assert 0 < relative(a, b) < 2e-2
    with pytest.raises(ValueError, match="bf16_logits is True and hidden is"):
        linear_logprob(*case.to(torch.float64), budget=budget)


def test_no_tokens_at_all():
    case = problem(0, 77)
    logp_N = linear_logprob(*case)
    d_hidden_ND, d_weight_VD = gradients(logp_N.sum(), case)
    assert logp_N.shape == (0,) and d_hidden_ND.shape == (0, 6) and torch.all(d_weight_VD == 0)


def test_padded_rows_of_the_vocabulary_are_minus_infinity():
    case = problem(CHUNK + 1, 77)
    case = Problem(case.hidden_ND, case.weight_VD, case.target_N % 60)
    actual = linear_logprob(*case, return_entropy=True, vocab_size=60, budget=small_chunks(77))
    expected = reference.linear_logprob(*case, return_entropy=True, vocab_size=60)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-12)
    actual, expected = gradients(upstream(*actual), case), gradients(upstream(*expected), case)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12
    assert torch.all(actual[1][60:] == 0)


def test_a_target_that_is_no_vocabulary_row_gives_nan():
    case = problem(4, 77)
    target_N = torch.tensor([0, -100, 59, 60]).to(DEVICE)
    logp_N = linear_logprob(*case.leaves, target_N, vocab_size=60)
    assert logp_N.isnan().tolist() == [False, True, False, True]


def test_rows_without_upstream_gradient_cannot_leak():
    case = problem(6, 77)
    poisoned = case.to(torch.float64)
    with torch.no_grad():
        poisoned.hidden_ND[2] = float("nan")
    used_N = torch.arange(6) != 2
    expected = gradients(upstream(linear_logprob(*case)[used_N]), case)
    actual = gradients(upstream(linear_logprob(*poisoned)[used_N]), poisoned)
    assert torch.all(actual[0][2] == 0)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < 1e-12


def test_autocast_does_not_lower_the_precision():
    case = problem(CHUNK, 77, dtype=torch.float32)
    logp_N = linear_logprob(*case)
    expected = gradients(upstream(logp_N), case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast_N = linear_logprob(*case)
        actual = gradients(upstream(cast_N), case)
    assert torch.equal(logp_N, cast_N)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_no_tensor_is_as_large_as_the_logits():
    tokens, vocab, width = 64, 1000, 6
    case = problem(tokens, vocab, width=width, dtype=torch.float32)
    budget = small_chunks(vocab, itemsize=4, columns=300)
    with Recorder() as recorder:
        upstream(*linear_logprob(*case, return_entropy=True, budget=budget)).backward()
    assert case.weight_VD.grad.abs().sum() > 0
    assert recorder.largest == 4 * max(vocab * width, CHUNK * vocab, tokens * width) < 4 * tokens * vocab / 10


def test_mistakes_are_named():
    hidden_ND, weight_VD, target_N = problem(3, 77)
    with pytest.raises(ValueError, match=r"hidden is \(3, 5\) and weight \(77, 6\)"):
        linear_logprob(hidden_ND[:, :5], weight_VD, target_N)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32 and weight torch\.float64"):
        linear_logprob(hidden_ND.float(), weight_VD, target_N)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        linear_logprob(hidden_ND.half(), weight_VD.half(), target_N)
    with pytest.raises(ValueError, match=r"target is torch\.float32"):
        linear_logprob(hidden_ND, weight_VD, target_N.float())
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logprob(hidden_ND, weight_VD, target_N, temperature=0)
    with pytest.raises(ValueError, match="vocab_size is 78"):
        linear_logprob(hidden_ND, weight_VD, target_N, vocab_size=78)
