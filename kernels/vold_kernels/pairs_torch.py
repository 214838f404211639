"""The row functions of `pairs.py` in plain torch, for machines without a GPU.

Shape letters as there, b columns of a block. The Triton kernels of the same functions: `pairs_triton.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .chunks import slices
from .divergence import Divergence, derivative, summands
from .rows_torch import BLOCK


def divergence_(
    sums_2C: Tensor, z_CU: Tensor, t_CU: Tensor, real_columns: Tensor, normaliser_4C: Tensor, divergence: Divergence
) -> None:
    sums_2C.zero_()
    for _, padding_b, logp_Cb, logq_Cb in _blocks(z_CU, t_CU, real_columns, normaliser_4C):
        for sum_C, summand_Cb in zip(sums_2C, summands(logp_Cb, logq_Cb, divergence), strict=True):
            sum_C += summand_Cb.masked_fill(padding_b, 0.0).sum(dim=1)


def divergence_dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    t_CU: Tensor,
    real_columns: Tensor,
    normaliser_4C: Tensor,
    mean_log_ratio_C: Tensor,
    weight_C: Tensor,
    divergence: Divergence,
) -> None:
    assert dz_CU.data_ptr() == z_CU.data_ptr() and dz_CU.dtype == z_CU.dtype
    for block, padding_b, logp_Cb, logq_Cb in _blocks(z_CU, t_CU, real_columns, normaliser_4C):
        dz_Cb = derivative(logp_Cb, logq_Cb, mean_log_ratio_C[:, None], divergence).mul_(weight_C[:, None])
        dz_CU[:, block] = dz_Cb.masked_fill_(padding_b, 0.0)


def _blocks(
    z_CU: Tensor, t_CU: Tensor, real_columns: Tensor, normaliser_4C: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(columns, True where they are padding, log p, log q), one block of columns after another."""
    max_C, log_sum_C, teacher_max_C, teacher_log_sum_C = normaliser_4C[:, :, None]
    padding_U = torch.arange(z_CU.shape[1], device=z_CU.device) >= real_columns
    for block in slices(z_CU.shape[1], BLOCK):
        logp_Cb = (z_CU[:, block] - max_C).sub_(log_sum_C)
        logq_Cb = (t_CU[:, block] - teacher_max_C).sub_(teacher_log_sum_C)
        yield block, padding_U[block], logp_Cb, logq_Cb
