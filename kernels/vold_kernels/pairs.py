"""The two row functions of a pair of heads, and the choice of backend for them.

Shape letters: C tokens of a chunk, U vocabulary rows of this rank. `Acc` is fp32 (fp64 for fp64 inputs). z are the
student's logits and t the teacher's, both after temperature. The formulas are in `divergence.py`.

    divergence_(sums_2C, z_CU, t_CU, real_columns, normaliser_4C, divergence)
        Writes this rank's part of (D, E_p[f]) of each row.
    divergence_dlogits_(dz_CU, z_CU, t_CU, real_columns, normaliser_4C, mean_log_ratio_C, weight_C, divergence)
        weight · dD/dz, written over z, exactly 0 in padding. dz as in `rows.py`: z itself, or a narrower dtype in its
        storage.

normaliser_4C: max and log_sum of the student, then of the teacher (see `softmax.SoftmaxStatistics`), over all ranks.
`real_columns` as in `rows.py`.
"""

from types import ModuleType

import torch

from . import pairs_torch
from .rows import uses_triton


def pair_functions(device: torch.device) -> ModuleType:
    """The backend for tensors on this device: `pairs_triton` or `pairs_torch`."""
    if not uses_triton(device):
        return pairs_torch
    from . import pairs_triton  # on first use: a CPU needs no triton

    return pairs_triton
