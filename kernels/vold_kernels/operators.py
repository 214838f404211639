"""What the torch.library operators of the one-pass losses share.

torch.compile holds such an operator without looking inside: reused buffers, row functions and collectives are nothing a
graph should see. An operator may not return None nor a number of rows that depends on data, so it returns dH of all
rows, and a gradient that is not wanted has no elements. Eager calls take the autograd.Function beside each operator.
"""

import torch
from torch import Tensor

from .head import HeadGradients, scaled, scatter_rows
from .matmuls import accumulator_dtype


def gradient_outputs(rows_n: Tensor, gradients: HeadGradients, tokens: int) -> tuple[Tensor, Tensor]:
    """(dH [N, D], dW), as accumulated: the last two outputs of an operator."""
    d_hidden_nD, d_weight_UD = gradients.finish()
    nothing = gradients.dropped_mass.new_empty(0)
    d_hidden_ND = nothing if d_hidden_nD is None else scatter_rows(rows_n, d_hidden_nD, tokens)
    return d_hidden_ND, nothing.clone() if d_weight_UD is None else d_weight_UD


def fake(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Outputs of these shapes in the dtype that inputs like this one are accumulated in."""
    return tuple(like.new_empty(shape, dtype=accumulator_dtype(like.dtype)) for shape in shapes)


def gradient_shapes(hidden_ND: Tensor, weight_UD: Tensor, wanted: list[bool]) -> list[tuple[int, ...]]:
    return [x.shape if want else (0,) for x, want in zip((hidden_ND, weight_UD), wanted, strict=True)]


def register_backward(operator: torch.library.CustomOpDef) -> None:
    """For operators whose first two inputs are hidden and weight, and whose first output is the loss."""
    operator.register_autograd(_backward, setup_context=_save)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[-2:])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, d_loss: Tensor, *_):
    gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    gradients = [scaled(gradient, d_loss, ctx.dtype) if need else None for gradient, need in gradients]
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 2)
