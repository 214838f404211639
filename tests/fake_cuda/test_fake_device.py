"""The parts of benchmarks/fake_cuda on their own: its backward pass beside torch's, its FLOPs by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.fake_cuda import device
from benchmarks.fake_cuda.engine import PythonEngine
from benchmarks.fake_cuda.work import Operation, Shape


class ThirdOfTwo(torch.autograd.Function):
    """Two outputs, of which one may get no gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, d_double, d_triple):
        [x] = ctx.saved_tensors
        return d_double * 2 + d_triple * 3 + 0 * x


class Model(nn.Module):
    """Shared weights, an expansion, an index, views and a branch that is not read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(1, 6))

    def forward(self, ids):
        hidden = self.table(ids)
        hidden = hidden + torch.tanh(self.inner(hidden)) + self.bias.expand(len(ids), -1)
        double, _unread = ThirdOfTwo.apply(hidden)
        left, right = double.split(3, dim=1)
        return ((left * right).softmax(0)[1:] @ self.table.weight[:, :3].t()).logsumexp(0).sum()


def test_backward_is_that_of_torch():
    model, ids = Model(), torch.tensor([1, 4, 4, 0])
    expected = copy.deepcopy(model)
    expected(ids).backward()
    engine = PythonEngine()
    with engine.saving():
        loss = model(ids)
    seen = []
    engine.after_accumulation[id(model.bias)] = lambda: seen.append(model.bias.grad.clone())
    engine.run_backward([loss], [torch.ones_like(loss)])
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert torch.equal(*seen, model.bias.grad)
    with pytest.raises(AssertionError, match="a second time"):
        engine.run_backward([loss], [torch.ones_like(loss)])


def operation(kind: str, name: str, *sizes: tuple[int, ...], **fields) -> Operation:
    shapes = tuple(Shape("bfloat16", size, (), "cuda", 2) for size in sizes)
    return Operation("step", kind, name, "here", shapes, (), **fields)


def test_flops_by_hand():
    assert operation("aten", "mm.default", (3, 5), (5, 7)).flops == 2 * 3 * 5 * 7
    assert operation("aten", "addmm.dtype_out", (3, 7), (3, 5), (5, 7), (3, 7)).flops == 2 * 3 * 5 * 7
    assert operation("aten", "bmm.default", (2, 3, 5), (2, 5, 7)).flops == 2 * 2 * 3 * 5 * 7
    assert operation("aten", "add.Tensor", (3, 5), (3, 5)).flops == 0
    segments = ((4, 4), (2, 6))  # 1 + 2 + 3 + 4 keys, then 5 + 6
    forward = operation("attention", "flash_attn forward", (6, 2, 8), (10, 1, 8), segments=segments)
    assert forward.flops == 2 * 2 * (10 + 11) * 2 * 8
    assert forward._replace(name="flash_attn backward").flops == 5 * 2 * (10 + 11) * 2 * 8


def test_bytes_are_those_on_the_device():
    assert operation("aten", "add.Tensor", (3, 5), (3, 5)).bytes == 60
    assert operation("aten", "view.default", (3, 5)).bytes == 0
    host = Shape("int64", (9,), (1,), "cpu", 8)
    assert operation("aten", "_to_copy.default", (9,))._replace(inputs=(host,)).bytes == 0


def test_other_versions_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert device.unsupported() == "fake CUDA knows torch 2.11 and 2.13; this is 2.9.1+cpu"
    with pytest.raises(RuntimeError, match=r"this is 2\.9\.1"):
        device.install()
