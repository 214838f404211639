"""Gradients of linear layers, added to `main_grad` by the matmul that computes them.

Otherwise a bf16 gradient is written, read again and added to the fp32 buffer: more bytes, and one rounding. Megatron
does so too ("gradient accumulation fusion"), through an extension of apex that is compiled on the machine; torch's
own matmul takes its place here. Everything else stays Megatron's: tensor and sequence parallelism, the hooks of its
data-parallel wrapper, which see the mark `grad_added_to_main_grad`.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor, nn

from vold_kernels.matmuls import uses_tensor_cores


def add_to_main_grad(chunk: nn.Module) -> None:
    """Let the trained linear layers of a chunk, which has its gradient buffers, accumulate so. Frozen ones are passed
    over: Megatron computes no gradient for them."""
    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add)
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight is not None:
            main_grad = getattr(module.weight, "main_grad", None)
            module.gradient_accumulation_fusion = main_grad is not None and main_grad.dtype == torch.float32


def _add(input_TD: Tensor, d_output_TU: Tensor, main_grad_UD: Tensor) -> None:
    factors = (d_output_TU.t(), input_TD)
    if uses_tensor_cores(input_TD):
        torch.addmm(main_grad_UD, *factors, out_dtype=torch.float32, out=main_grad_UD)
    else:
        torch.addmm(main_grad_UD, *(x.to(main_grad_UD.dtype) for x in factors), out=main_grad_UD)
