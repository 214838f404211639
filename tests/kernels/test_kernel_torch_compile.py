"""The public functions inside torch.compile(fullgraph=True): opaque operators with the bits of the eager call."""

import pytest
import torch
from kernel_cases import CHUNK, gradients, problem, small_chunks

from vold_kernels.linear_logprob import linear_logprob


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
