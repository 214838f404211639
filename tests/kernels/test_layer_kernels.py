"""The kernels of a layer (q, k and v out of the joint projection; a residual's sum with its norm) against their
specification in fp64, in value and gradient.

On a CPU they run through Triton's interpreter alone: see test_kernel_interpreter.py. Letters as in vold_kernels/qkv.py.
"""

import pytest
import torch
from kernel_cases import DEVICE, INTERPRETED
from torch import Tensor

from vold_kernels import reference
from vold_kernels.add_norm import add_rms_norm, rms_norm
from vold_kernels.qkv import Heads, SharedKeys, qkv_norm_rope

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA or Triton's interpreter")
EPS = 1e-6
FAMILIES = {  # query heads, key heads, width, with norms
    "qwen3": (16, 8, 128, True),
    "qwen3-tp2": (8, 4, 128, True),
    "qwen2": (14, 2, 64, False),
    "qwen2.5-vl": (12, 2, 128, False),
    "smollm2": (9, 3, 64, False),
    "odd": (6, 3, 40, True),
    "mha": (2, 2, 16, True),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def tables(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Every position three axes, as Qwen2.5-VL has it; both halves alike."""
    generator = torch.Generator().manual_seed(9)
    axes_3T = torch.randint(0, 5000, (3, tokens), generator=generator)
    chosen = torch.arange(width // 2) % 3
    angles = axes_3T[chosen].T.double() / 10000 ** (torch.arange(width // 2) / (width / 2))
    angles = torch.cat((angles, angles), -1).to(DEVICE)
    return torch.stack((angles.cos(), angles.sin())).to(torch.float64 if dtype == torch.float64 else torch.float32)


def shared_keys(tokens: int) -> Tensor:
    """Three responses to a prompt of the first tokens; the last but one token is nobody's key, the last is a pad."""
    prompt, rest = torch.arange(tokens // 3), torch.arange(tokens // 3, tokens - 2).chunk(3)
    return torch.cat([torch.cat((prompt, part)) for part in rest] + [torch.tensor([tokens - 1])]).to(DEVICE)


def run(function, inputs: list[Tensor], dtype: torch.dtype, upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of copies of the inputs in this dtype."""
    copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*copies)
    gradients = torch.autograd.grad(outputs, copies, [g.to(dtype) for g in upstream])
    return [x.detach() for x in (*outputs, *gradients)]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error, Frobenius."""
    return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("family", FAMILIES)
def test_qkv(family: str, shared: bool, dtype: torch.dtype):
    queries, keys, width, has_norms = FAMILIES[family]
    if INTERPRETED and dtype != torch.float32 and family not in ("odd", "mha"):
        pytest.skip("the interpreter is slow: large heads in fp32 alone")
    tokens, heads = 11, Heads(queries, keys, width, EPS if has_norms else None)
    mixed = draw(tokens, (queries + 2 * keys) * width, seed=0, dtype=dtype)
    weights = [draw(width, seed=1 + i, dtype=dtype) for i in range(2)] if has_norms else []
    sharing = SharedKeys(shared_keys(tokens), tokens) if shared else None
    count = len(sharing.index_S) if sharing else tokens
    shapes = [(tokens, queries, width), (count, keys, width), (count, keys, width)]
    upstream = [draw(*shape, seed=5 + i, dtype=dtype).detach() for i, shape in enumerate(shapes)]

    def pieces(function, dtype):
        table = tables(tokens, width, dtype)
        return lambda mixed, *w: function(mixed, w or None, table, heads, sharing)

    inputs = [mixed, *weights]
    expected = run(pieces(reference.qkv_norm_rope, torch.float64), inputs, torch.float64, upstream)
    plain = run(pieces(reference.qkv_norm_rope, dtype), inputs, dtype, upstream)
    ours = run(pieces(qkv_norm_rope, dtype), inputs, dtype, upstream)
    assert [x.shape for x in ours] == [x.shape for x in expected]
    assert min(float(x.norm()) for x in expected) > 0
    error, of_torch = worst(ours, expected), worst(plain, expected)
    assert error <= TOLERANCE[dtype], (error, of_torch)
    if not INTERPRETED or dtype != torch.bfloat16:  # the interpreter truncates where it should round
        assert error <= max(1.25 * of_torch, 1e-6 if dtype == torch.float32 else 1e-13), (error, of_torch)
    again = run(pieces(qkv_norm_rope, dtype), inputs, dtype, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    if shared:
        assert not ours[3][tokens - 2].view(keys, -1, width)[:, -2:].any(), "a token that is nobody's key"


def test_a_projection_whose_rows_are_a_view():
    heads, dtype = Heads(4, 2, 16, EPS), torch.float32
    wide = draw(7, 200, seed=0, dtype=dtype)
    weights, table = tuple(draw(16, seed=i, dtype=dtype) for i in (1, 2)), tables(7, 16, dtype)
    found = [f(wide[:, 8 : 8 + 128], weights, table, heads) for f in (qkv_norm_rope, reference.qkv_norm_rope)]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", [True, False], ids=["sum", "norm alone"])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (16, 64), (37, 96), (5, 2048)])
def test_add_norm(rows: int, width: int, residual: bool, dtype: torch.dtype):
    inputs = [draw(rows, 1, width, seed=i, dtype=dtype) for i in range(1 + residual)] + [
        draw(width, seed=2, dtype=dtype)
    ]
    upstream = [draw(rows, 1, width, seed=5 + i, dtype=dtype).detach() for i in range(1 + residual)]

    def ours(x, *others):
        return add_rms_norm(x, *others, EPS) if residual else (rms_norm(x, *others, EPS),)

    def specified(x, *others):
        return reference.add_rms_norm(x, *others, EPS) if residual else (reference.rms_norm(x, *others, EPS),)

    expected = run(specified, inputs, torch.float64, upstream)
    plain, found = run(specified, inputs, dtype, upstream), run(ours, inputs, dtype, upstream)
    error, of_torch = worst(found, expected), worst(plain, expected)
    assert error <= TOLERANCE[dtype], (error, of_torch)
    if not INTERPRETED or dtype != torch.bfloat16:
        assert error <= max(1.25 * of_torch, 1e-6 if dtype == torch.float32 else 1e-13), (error, of_torch)
    assert all(torch.equal(a, b) for a, b in zip(found, run(ours, inputs, dtype, upstream), strict=True))


@pytest.mark.parametrize("used", [0, 1], ids=["the sum alone", "the norm alone"])
def test_one_of_both_outputs_may_be_unused(used: int):
    x, residual, weight = (draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(3, 8), (3, 8), (8,)]))
    up = draw(3, 8, seed=7, dtype=torch.float64).detach()
    inputs = [x, residual] + [weight] * used
    ours = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS)[used], inputs, up)
    expected = torch.autograd.grad(reference.add_rms_norm(x, residual, weight, EPS)[used], inputs, up)
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
