"""A residual connection's sum and the RMSNorm that follows it, as one operation.

    total = x + residual,   y = total / sqrt(mean(total²) + eps) · weight

Shape letters: T rows, D width. `reference.add_rms_norm` is the specification. The sum of the two gradients that meet at
`total` is part of the backward kernel, and two runs are equal to the bit.
"""

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its RMSNorm), both like x [..., D], by Triton: CUDA, or its interpreter."""
    total, y = _AddNorm.apply(x, residual, weight_D, eps)
    return total, y


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm alone."""
    return _AddNorm.apply(x, None, weight_D, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight_D, eps: float):
        from . import add_norm_triton  # on first use: a CPU needs no triton

        ctx.set_materialize_grads(False)
        rows_TD = x.contiguous().view(-1, x.shape[-1])
        inputs_TD = rows_TD if residual is None else residual.contiguous().view(-1, x.shape[-1])
        y_TD = torch.empty_like(rows_TD)
        total_TD = rows_TD if residual is None else torch.empty_like(rows_TD)
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale_T = rows_TD.new_empty(len(rows_TD), dtype=acc)
        options = {"EPS": eps, "HAS_RESIDUAL": residual is not None}
        add_norm_triton.forward_((total_TD, y_TD, scale_T), (rows_TD, inputs_TD, weight_D), **options)
        ctx.save_for_backward(total_TD, scale_T, weight_D)
        ctx.has_residual = residual is not None
        y = y_TD.view(x.shape)
        return y if residual is None else (total_TD.view(x.shape), y)

    @staticmethod
    def backward(ctx, *gradients):
        from . import add_norm_triton

        *d_total, d_y = gradients
        d_total = d_total[0] if d_total else None
        if d_y is None:
            return d_total, d_total if ctx.has_residual else None, None, None
        total_TD, scale_T, weight_D = ctx.saved_tensors
        d_y_TD = d_y.contiguous().view(total_TD.shape)
        d_total_TD = d_y_TD if d_total is None else d_total.contiguous().view(total_TD.shape)
        d_x_TD = torch.empty_like(total_TD)
        d_weight_D = scale_T.new_empty(-(-len(total_TD) // add_norm_triton.ROWS), total_TD.shape[1])
        inputs = (d_y_TD, d_total_TD, total_TD, scale_T, weight_D)
        add_norm_triton.backward_((d_x_TD, d_weight_D), inputs, HAS_D_TOTAL=d_total is not None)
        d_x = d_x_TD.view(d_y.shape)
        return d_x, d_x if ctx.has_residual else None, d_weight_D.sum(0).to(weight_D.dtype), None
