"""A residual connection's sum and the RMSNorm that follows it, as one operation.

    total = x + residual,   y = total / sqrt(mean(total²) + eps) · weight

Shape letters: T rows, D width. `reference.add_rms_norm` is the specification. The sum of the two gradients that meet at
`total` is part of the backward kernel, and two runs are equal to the bit.
"""

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its RMSNorm), both like x [..., D], by Triton: CUDA, or its interpreter."""
    return _AddNorm.apply(x, residual, weight_D, eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm alone."""
    return _AddNorm.apply(x, None, weight_D, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight_D, eps: float):
        from . import add_norm_triton  # on first use: a CPU needs no triton

        ctx.set_materialize_grads(False)
        x = x.contiguous()
        y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = x.new_empty(x.shape[:-1], dtype=acc)
        inputs = (x, x if residual is None else residual.contiguous(), weight_D)
        add_norm_triton.forward_((total, y, scale), inputs, EPS=eps, HAS_RESIDUAL=residual is not None)
        ctx.save_for_backward(total, scale, weight_D)
        ctx.has_residual = residual is not None
        return y if residual is None else (total, y)

    @staticmethod
    def backward(ctx, *gradients):
        from . import add_norm_triton

        d_total, d_y = gradients if ctx.has_residual else (None, *gradients)
        if d_y is None:
            return d_total, d_total, None, None
        total, scale, weight_D = ctx.saved_tensors
        d_y, d_x = d_y.contiguous(), torch.empty_like(total)
        others = (d_y if d_total is None else d_total.contiguous(), total, scale, weight_D)
        d_weight_D = scale.new_empty(-(-scale.numel() // add_norm_triton.ROWS), weight_D.shape[0])
        add_norm_triton.backward_((d_x, d_weight_D), (d_y, *others), HAS_D_TOTAL=d_total is not None)
        d_weight_D = d_weight_D.sum(0).to(weight_D.dtype)
        return d_x, d_x if ctx.has_residual else None, d_weight_D, None
