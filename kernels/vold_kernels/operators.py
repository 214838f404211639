"""Shared parts of the torch.library operators that wrap the one-pass losses for torch.compile.

torch.compile treats such an operator as opaque: reused buffers, row functions and collectives do not belong in a graph.
An operator may return neither None nor a number of rows that depends on data, so it returns dH of all rows, and a
gradient that is not needed has no elements. Eager calls use the autograd.Function beside each operator.
"""

from collections.abc import Sequence

from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .chunks import ChunkBudget
from .head import HeadGradients, scaled, scatter_rows
from .matmuls import accumulator_dtype


def budget_numbers(budget: ChunkBudget) -> list[int]:
    """A budget as an argument of an operator."""
    return [int(value) for value in vars(budget).values()]


def budget_from_numbers(numbers: list[int]) -> ChunkBudget:
    """Inverse of `budget_numbers`."""
    *sizes, bf16_logits, overlap = numbers
    return ChunkBudget(*sizes, bf16_logits=bool(bf16_logits), overlap=bool(overlap))


def gradient_outputs(rows_n: Tensor, gradients: HeadGradients, tokens: int) -> tuple[Tensor, Tensor]:
    """(dH [N, D], dW), as accumulated: the last two outputs of an operator."""
    d_hidden_nD, d_weight_UD = gradients.finish()
    no_elements = gradients.dropped_mass.new_empty(0)
    d_hidden_ND = no_elements if d_hidden_nD is None else scatter_rows(rows_n, d_hidden_nD, tokens)
    return d_hidden_ND, no_elements.clone() if d_weight_UD is None else d_weight_UD


def fake_outputs(like: Tensor, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    """Fake tensors of these shapes, in the dtype in which inputs like this one are accumulated."""
    return tuple(like.new_empty(shape, dtype=accumulator_dtype(like.dtype)) for shape in shapes)


def gradient_shapes(hidden_ND: Tensor, weight_UD: Tensor, needs_grad: list[bool]) -> list[Sequence[int]]:
    """Shapes of `gradient_outputs`."""
    return [x.shape if needed else (0,) for x, needed in zip((hidden_ND, weight_UD), needs_grad, strict=True)]


def register_backward(operator: CustomOpDef) -> None:
    """Makes an operator differentiable whose first two inputs are hidden and weight, whose first output is the loss and
    whose last two are `gradient_outputs`."""
    operator.register_autograd(_backward, setup_context=_save)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[-2:])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, d_loss: Tensor, *_):
    gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    gradients = [scaled(gradient, d_loss, ctx.dtype) if needed else None for gradient, needed in gradients]
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 2)
