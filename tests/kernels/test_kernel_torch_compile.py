"""The public functions inside torch.compile(fullgraph=True): opaque operators with the bits of the eager call."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import CHUNK, CLIP, gradients, policy_terms, problem, small_chunks

from vold_kernels.linear_logprob import linear_logprob
from vold_kernels.linear_policy_loss import linear_policy_loss


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
    terms = policy_terms(case)

    def loss(hidden_ND, weight_VD, target_N):
        keywords = {"temperature": 0.7, "vocab_size": 70, "budget": budget, **CLIP}
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
