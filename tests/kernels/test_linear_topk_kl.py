"""linear_topk_kl against the specification, and against linear_kl where both can answer."""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_cases import CHUNK, DEVICE, gradients, problem, relative, small_chunks

from vold_kernels import linear_kl, linear_topk_kl, reference

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.3)]


def teacher_top(case, k: int, seed: int = 3):
    """Ids and log-probs of another distribution's k most probable columns."""
    torch.manual_seed(seed)
    tokens, vocab = len(case.hidden_ND), len(case.weight_VD)
    logq_NV = torch.randn(tokens, vocab, dtype=torch.float64, device=DEVICE).mul(2).log_softmax(-1)
    top = logq_NV.topk(k)
    return logq_NV, top.indices, top.values


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
@pytest.mark.parametrize(("tokens", "vocab", "k"), [(1, 77, 5), (2 * CHUNK + 3, 77, 20), (CHUNK + 1, 1000, 1)])
def test_float64_equals_the_specification(kind, alpha, tokens, vocab, k):
    case = problem(tokens, vocab)
    _, ids, logps = teacher_top(case, k)
    weight_N = torch.linspace(0.1, 1.0, tokens, dtype=torch.float64, device=DEVICE)
    weight_N[1::3] = 0.0
    logps[1::3] = torch.nan  # never read
    options = {"weight_N": weight_N, "divergence": kind, "alpha": alpha, "temperature": 0.7}
    head = (case.hidden_ND, case.weight_VD)
    actual = linear_topk_kl(*head, ids, logps, **options, budget=small_chunks(vocab))
    expected = reference.linear_topk_kl(*head, ids, logps, **options)
    assert expected.loss > 0
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(actual.kl_N, expected.kl_N, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(gradients(record.loss, case) for record in (actual, expected)), strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_it_grows_with_k_towards_the_whole_divergence(kind, alpha):
    case = problem(9, 60)
    torch.manual_seed(4)
    teacher_ND = case.hidden_ND.detach() + 0.7 * torch.randn_like(case.hidden_ND)
    teacher_VD = case.weight_VD.detach() + 0.2 * torch.randn_like(case.weight_VD)
    logq_NV = (teacher_ND @ teacher_VD.T).log_softmax(-1)
    weight_N = torch.ones(9, dtype=torch.float64, device=DEVICE)
    options = {"weight_N": weight_N, "divergence": kind, "alpha": alpha}
    whole = linear_kl(case.hidden_ND, case.weight_VD, teacher_ND, teacher_VD, **options)
    values = []
    for k in (1, 5, 20, 59):
        top = logq_NV.topk(k)
        values.append(linear_topk_kl(case.hidden_ND, case.weight_VD, top.indices, top.values, **options).kl_N)
    for less, more in itertools.pairwise(values):
        assert bool((less <= more + 1e-12).all())
    torch.testing.assert_close(values[-1], whole.kl_N, rtol=1e-8, atol=1e-10)


def test_missing_ids_are_none_and_padding_is_no_id():
    """-1 beside -inf in the places that a server left empty; rows of the head beyond the vocabulary count for
    nothing."""
    case = problem(5, 64)
    _, ids, logps = teacher_top(replace(case, weight_VD=case.weight_VD[:50]), 6)
    weight_N = torch.ones(5, dtype=torch.float64, device=DEVICE)
    options = {"weight_N": weight_N, "vocab_size": 50}
    expected = linear_topk_kl(case.hidden_ND, case.weight_VD, ids, logps, **options)
    beyond = torch.full_like(ids[:, :1], 57)  # an id of the server's padding, whose mass is the tail's
    with_padding = (torch.cat([ids, beyond], 1), torch.cat([logps, torch.full_like(logps[:, :1], -3.0)], 1))
    of_padding = linear_topk_kl(case.hidden_ND, case.weight_VD, *with_padding, **options)
    torch.testing.assert_close(of_padding.kl_N, expected.kl_N, rtol=1e-12, atol=1e-13)
    padded = (torch.nn.functional.pad(ids, (2, 3), value=-1), torch.nn.functional.pad(logps, (2, 3), value=-torch.inf))
    actual = linear_topk_kl(case.hidden_ND, case.weight_VD, *padded, **options)
    torch.testing.assert_close(actual.kl_N, expected.kl_N, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        expected.kl_N, reference.linear_topk_kl(case.hidden_ND, case.weight_VD, ids, logps, **options).kl_N
    )
    for a, b in zip(*(gradients(record.loss, case) for record in (actual, expected)), strict=True):
        assert relative(a, b) < 1e-12
    of_weight = gradients(linear_topk_kl(case.hidden_ND, case.weight_VD, *padded, **options).loss, case)[1]
    assert of_weight[50:].abs().max() == 0


def test_main_grad_and_shapes():
    case = problem(5, 40, dtype=torch.float32)
    _, ids, logps = teacher_top(case, 4)
    weight_N = torch.ones(5, device=DEVICE)
    top = (ids, logps.float())
    expected = gradients(linear_topk_kl(case.hidden_ND, case.weight_VD, *top, weight_N=weight_N).loss, case)
    main_grad = torch.ones_like(case.weight_VD)
    loss = linear_topk_kl(
        case.hidden_ND, case.weight_VD, ids, logps.float(), weight_N=weight_N, weight_main_grad=main_grad
    ).loss
    (hidden,) = torch.autograd.grad(loss, [case.hidden_ND])
    torch.testing.assert_close(hidden, expected[0])
    torch.testing.assert_close(main_grad - 1, expected[1], rtol=1e-4, atol=1e-6)
    for wrong in ((ids[:4], logps[:4]), (ids.float(), logps), (ids, logps[:, :3])):
        with pytest.raises(ValueError, match="ids are"):
            linear_topk_kl(case.hidden_ND, case.weight_VD, *wrong, weight_N=weight_N)
