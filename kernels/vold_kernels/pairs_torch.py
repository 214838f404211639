"""The row functions of `pairs.py` in plain torch, for machines without a GPU.

Shape letters as there, b columns of a block, c tokens of a thread. The
Triton kernels of the same functions: `pairs_triton.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .chunks import slices
from .divergence import Divergence, derivative, summands
from .rows_torch import BLOCK
from .threads import in_threads, pieces


def divergence_(
    sums_2C: Tensor, z_CU: Tensor, t_CU: Tensor, real_columns: Tensor, normaliser_4C: Tensor, divergence: Divergence
) -> None:
    sums_2C.zero_()

    def add_up(part: slice) -> None:
        for _, padding_b, logp_cb, logq_cb in _blocks(z_CU[part], t_CU[part], real_columns, normaliser_4C[:, part]):
            for sum_c, summand_cb in zip(sums_2C[:, part], summands(logp_cb, logq_cb, divergence), strict=True):
                sum_c += summand_cb.masked_fill(padding_b, 0.0).sum(dim=1)

    in_threads(add_up, pieces(sums_2C, z_CU.shape[1]))


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

    def overwrite(part: slice) -> None:
        mean_log_ratio_c1, weight_c1 = mean_log_ratio_C[part, None], weight_C[part, None]
        blocks = _blocks(z_CU[part], t_CU[part], real_columns, normaliser_4C[:, part])
        for block, padding_b, logp_cb, logq_cb in blocks:
            dz_cb = derivative(logp_cb, logq_cb, mean_log_ratio_c1, divergence).mul_(weight_c1)
            dz_CU[part, block] = dz_cb.masked_fill_(padding_b, 0.0)

    in_threads(overwrite, pieces(weight_C, z_CU.shape[1]))


def _blocks(
    z_cU: Tensor, t_cU: Tensor, real_columns: Tensor, normaliser_4c: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(columns, True where they are padding, log p, log q), one block of columns after another."""
    max_c1, log_sum_c1, teacher_max_c1, teacher_log_sum_c1 = normaliser_4c[:, :, None]
    padding_U = torch.arange(z_cU.shape[1], device=z_cU.device) >= real_columns
    for block in slices(z_cU.shape[1], BLOCK):
        logp_cb = (z_cU[:, block] - max_c1).sub_(log_sum_c1)
        logq_cb = (t_cU[:, block] - teacher_max_c1).sub_(teacher_log_sum_c1)
        yield block, padding_U[block], logp_cb, logq_cb
