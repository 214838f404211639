"""The public functions inside torch.compile(fullgraph=True): opaque operators with the bits of the eager call."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CHUNK,
    CLIP,
    bounded,
    coupled,
    gradients,
    pair_problem,
    policy_terms,
    problem,
    small_chunks,
    token_weights,
)

from vold_kernels import linear_kl, linear_logprob, linear_policy_loss
from vold_kernels.linear_kl import _kl_op
from vold_kernels.linear_logprob import _logprob_op
from vold_kernels.linear_policy_loss import _policy_loss_op


def compiled(function, backend: str):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_logprob(dtype, backend):
    case, budget = problem(2 * CHUNK + 1, 77, dtype=dtype), small_chunks(77)

    def loss(hidden_ND, weight_VD, target_N):
        keywords = {"temperature": 0.7, "return_entropy": True, "vocab_size": 70, "budget": budget}
        logp_N, entropy_N = linear_logprob(2 * hidden_ND, weight_VD, target_N % 70, **keywords)
        return logp_N.square().sum() + entropy_N.exp().sum()

    actual, expected = compiled(loss, backend)(*case), loss(*case)
    assert torch.equal(actual, expected) and actual != 0
    for a, b in zip(gradients(actual, case), gradients(expected, case), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_linear_logprob_with_a_frozen_weight_and_without_gradients():
    case = problem(CHUNK + 1, 77)
    frozen = (case.hidden_ND, case.weight_VD.detach(), case.target_N)
    function = compiled(linear_logprob, "aot_eager")
    (d_hidden_ND,) = torch.autograd.grad(function(*frozen).sum(), case.hidden_ND)
    assert torch.equal(d_hidden_ND, gradients(linear_logprob(*case).sum(), case)[0])
    with torch.no_grad():
        assert torch.equal(function(*case), linear_logprob(*case))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_policy_loss(dtype, backend):
    case, budget = problem(2 * CHUNK + 1, 77, dtype=dtype), small_chunks(77)
    terms = coupled(bounded(policy_terms(case))) if dtype == torch.float64 else policy_terms(case)

    def loss(hidden_ND, weight_VD, target_N):
        keywords = {"temperature": 0.7, "vocab_size": 70, "budget": budget, **CLIP}
        if dtype == torch.float64:
            keywords |= {"entropy_bonus": 0.3, "kl_clamp": 0.5, "surrogate": "gate", "gate_temperatures": (2.0, 0.5)}
        record = linear_policy_loss(2 * hidden_ND, weight_VD, target_N % 70, terms, **keywords)
        return -1.7 * record.loss, record

    (actual, record), (expected, exact) = compiled(loss, backend)(*case), loss(*case)
    assert torch.equal(actual, expected) and actual != 0
    for name, value in vars(record).items():
        assert torch.equal(value, getattr(exact, name)) and value.dtype == getattr(exact, name).dtype
        assert value.requires_grad == (name == "loss")
    for a, b in zip(gradients(actual, case), gradients(expected, case), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_linear_policy_loss_with_a_frozen_weight_on_policy_and_without_gradients():
    case = problem(CHUNK + 1, 77)
    terms = replace(policy_terms(case), logp_old_N=None)

    def loss(hidden_ND, weight_VD, target_N):
        return linear_policy_loss(hidden_ND, weight_VD, target_N, terms, **CLIP).loss

    function = compiled(loss, "aot_eager")
    frozen = (case.hidden_ND, case.weight_VD.detach(), case.target_N)
    (d_hidden_ND,) = torch.autograd.grad(function(*frozen), case.hidden_ND)
    assert torch.equal(d_hidden_ND, gradients(loss(*case), case)[0])
    with torch.no_grad():
        assert torch.equal(function(*case), loss(*case))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_linear_kl(top_k, backend):
    case, weight_N = pair_problem(2 * CHUNK + 1, 77), token_weights(2 * CHUNK + 1)

    def loss(hidden_ND, *others):
        record = linear_kl(2 * hidden_ND, *others, weight_N=weight_N, divergence="jsd", top_k=top_k, vocab_size=70)
        return -1.7 * record.loss, record.kl_N

    actual, expected = compiled(loss, backend)(*case), loss(*case)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0
    for a, b in zip(gradients(actual[0], case), gradients(expected[0], case), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_the_operators_keep_the_rules_of_torch_library():
    case, pair, weight_N = problem(5, 77), pair_problem(5, 77), token_weights(5)
    sizes = list(vars(small_chunks(77)).values())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_logprob_op, (*case, 0.7, 70, None, sizes), test_utils=tests)
    for needs_grad in ([True, True], [False, True]):
        terms = vars(policy_terms(case)).values()
        torch.library.opcheck(
            _policy_loss_op,
            (*case, *terms, needs_grad, 70, None, sizes, "gate", [0.7, 0.0, 0.2, 0.3, 2.0, 0.1, 0.5, 1.05, 1.0]),
            test_utils=tests,
        )
        constants = (needs_grad, 70, None, sizes, "forward_kl", None, [0.5, 0.7, 0.0])
        torch.library.opcheck(_kl_op, (*pair, weight_N, *constants), test_utils=tests)


def test_main_grad_is_refused_inside_a_graph():
    case = problem(5, 77)
    terms, main_grad_VD = policy_terms(case), torch.zeros(77, 6, dtype=torch.float64, device=case.hidden_ND.device)

    def loss(hidden_ND, weight_VD, target_N):
        return linear_policy_loss(hidden_ND, weight_VD, target_N, terms, **CLIP, weight_main_grad=main_grad_VD).loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match="weight_main_grad cannot be written inside"):
        compiled(loss, "eager")(*case)
    assert torch.all(main_grad_VD == 0)
