"""The three matmuls of a head: logits, dH and dW, with fp32 results for every input dtype (fp64 for fp64).

Shape letters: C tokens of a chunk, D hidden, U vocabulary rows of this rank, B columns of one tile.
bf16 on CUDA: the tensor cores accumulate in fp32 and `out_dtype` stores that, so nothing passes through bf16.
Elsewhere bf16 is cast up, one tile of vocabulary rows at a time. fp32 on CUDA follows torch's TF32 setting (off by
default). Every call passes `out=`: it accumulates without a copy, and autocast does not change such calls.
"""

import torch
from torch import Tensor

from .chunks import TILE_COLUMNS, slices


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and gradients for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uses_tensor_cores(x: Tensor) -> bool:
    """True where a matmul multiplies bf16 and returns fp32."""
    return x.is_cuda and x.dtype == torch.bfloat16


def logits_(z_CB: Tensor, hidden_CD: Tensor, weight_BD: Tensor, *, temperature: float) -> Tensor:
    """z = hidden weightᵀ / temperature, the division done by the matmul's alpha."""
    if uses_tensor_cores(hidden_CD):
        return _addmm_(z_CB, hidden_CD, weight_BD.t(), beta=0.0, alpha=1 / temperature)
    hidden_CD = hidden_CD.to(z_CB.dtype)
    for tile in slices(weight_BD.shape[0], TILE_COLUMNS):
        _addmm_(z_CB[:, tile], hidden_CD, weight_BD[tile].to(z_CB.dtype).t(), beta=0.0, alpha=1 / temperature)
    return z_CB


def hidden_gradient_(d_hidden_CD: Tensor, d_logits_CU: Tensor, weight_UD: Tensor, *, accumulate: bool = False) -> None:
    """d_hidden = (d_hidden +) d_logits weight, over this rank's rows."""
    if uses_tensor_cores(weight_UD):
        _addmm_(d_hidden_CD, d_logits_CU, weight_UD, beta=float(accumulate))
        return
    for tile in slices(weight_UD.shape[0], TILE_COLUMNS):
        weight_BD = weight_UD[tile].to(d_hidden_CD.dtype)
        _addmm_(d_hidden_CD, d_logits_CU[:, tile], weight_BD, beta=float(accumulate or tile.start > 0))


def weight_gradient_(d_weight_UD: Tensor, d_logits_CU: Tensor, hidden_CD: Tensor, *, accumulate: bool) -> None:
    """d_weight = (d_weight +) d_logitsᵀ hidden."""
    if not uses_tensor_cores(hidden_CD):
        hidden_CD = hidden_CD.to(d_weight_UD.dtype)
    _addmm_(d_weight_UD, d_logits_CU.t(), hidden_CD, beta=float(accumulate))


def _addmm_(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """out = beta · out + alpha · a b. With beta 0 the old values of `out` are ignored, NaN included."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
