"""The row functions of `pairs.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there.

Why: each kernel reads the two chunks of logits once, which is what bounds it; torch would read them once per operation.
The rules are those of `rows_triton.py`: arithmetic in the dtype of the statistics, loads cast to it at once, and a
narrower DZ never lies over a block that is still to be read. The same functions in plain torch: `pairs_torch.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .divergence import KINDS, Divergence
from .rows_triton import launch


@triton.jit
def _log_ratios_to_mixture(log_ratio, alpha):
    """(log p/m, log q/m) from log p − log q: `divergence.log_ratios_to_mixture`."""
    zero = tl.cast(0.0, log_ratio.dtype)
    one = tl.cast(1.0, log_ratio.dtype)
    larger_weight = tl.where(log_ratio < zero, alpha, one - alpha)
    log_m_over_larger = tl.log(larger_weight + (one - larger_weight) * tl.exp(-tl.abs(log_ratio)))
    return tl.minimum(log_ratio, zero) - log_m_over_larger, tl.minimum(-log_ratio, zero) - log_m_over_larger


@triton.jit
def divergence_kernel(
    SUMS,  # [2, C] Acc, row stride sums_stride: D, E_p[f]; written
    Z,  # [C, U] Acc, row stride z_stride: the student's logits
    T,  # [C, U] Acc, row stride t_stride: the teacher's logits
    REAL_COLUMNS,  # [] int64, columns of the rank that are no padding
    NORMALISER,  # [4, C] Acc, row stride normaliser_stride: max, log_sum of the student, then of the teacher
    ALPHA,  # [] Acc, used by jsd only
    sums_stride,
    z_stride,
    t_stride,
    normaliser_stride,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This rank's part of (D, E_p[f]): `pairs_torch.divergence_`."""
    row = tl.program_id(0).to(tl.int64)
    Acc = Z.dtype.element_ty
    Z += row * z_stride
    T += row * t_stride
    NORMALISER += row
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns)
    row_max = tl.load(NORMALISER)
    log_sum = tl.load(NORMALISER + normaliser_stride)
    teacher_max = tl.load(NORMALISER + 2 * normaliser_stride)
    teacher_log_sum = tl.load(NORMALISER + 3 * normaliser_stride)
    zero = tl.cast(0.0, Acc)
    alpha = tl.load(ALPHA)
    divergence = zero
    mean_log_ratio = zero
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_real = column < real_columns
        logp = (tl.load(Z + column, mask=is_real, other=0.0).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + column, mask=is_real, other=0.0).to(Acc) - teacher_max) - teacher_log_sum
        if KIND == "reverse_kl":
            divergence += tl.sum(tl.where(is_real, tl.exp(logp) * (logp - logq), zero), 0)
        elif KIND == "forward_kl":
            divergence += tl.sum(tl.where(is_real, tl.exp(logq) * (logq - logp), zero), 0)
        else:
            # triton types a call of a jitted function as NoReturn.
            log_p_over_m, log_q_over_m = _log_ratios_to_mixture(logp - logq, alpha)  # pyright: ignore[reportGeneralTypeIssues]
            mean_log_ratio += tl.sum(tl.where(is_real, tl.exp(logp) * log_p_over_m, zero), 0)
            divergence += tl.sum(tl.where(is_real, tl.exp(logq) * log_q_over_m, zero), 0)
    if KIND == "reverse_kl":
        mean_log_ratio = divergence
    if KIND == "jsd":
        divergence = alpha * divergence + (tl.cast(1.0, Acc) - alpha) * mean_log_ratio
    tl.store(SUMS + row, divergence)
    tl.store(SUMS + sums_stride + row, mean_log_ratio)


@triton.jit
def divergence_dlogits_kernel(
    DZ,  # [C, U] Acc or bf16, row stride dz_stride; written; may alias Z, each row starting at the same byte
    Z,  # [C, U] Acc, row stride z_stride: the student's logits
    T,  # [C, U] Acc, row stride t_stride: the teacher's logits
    REAL_COLUMNS,  # [] int64, columns of the rank that are no padding
    NORMALISER,  # [4, C] Acc, row stride normaliser_stride: max, log_sum of the student, then of the teacher
    MEAN_LOG_RATIO,  # [C] Acc, E_p[f] over all ranks
    WEIGHT,  # [C] Acc, weight of the token over temperature
    ALPHA,  # [] Acc, used by jsd only
    dz_stride,
    z_stride,
    t_stride,
    normaliser_stride,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the student's logits, over them: `pairs_torch.divergence_dlogits_`."""
    row = tl.program_id(0).to(tl.int64)
    Acc = Z.dtype.element_ty
    Z += row * z_stride
    T += row * t_stride
    DZ += row * dz_stride
    NORMALISER += row
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns)
    row_max = tl.load(NORMALISER)
    log_sum = tl.load(NORMALISER + normaliser_stride)
    teacher_max = tl.load(NORMALISER + 2 * normaliser_stride)
    teacher_log_sum = tl.load(NORMALISER + 3 * normaliser_stride)
    mean_log_ratio = tl.load(MEAN_LOG_RATIO + row)
    weight = tl.load(WEIGHT + row)
    alpha = tl.load(ALPHA)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_real = column < real_columns
        logp = (tl.load(Z + column, mask=is_real, other=0.0).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + column, mask=is_real, other=0.0).to(Acc) - teacher_max) - teacher_log_sum
        tl.debug_barrier()  # see dlogits_kernel
        if KIND == "reverse_kl":
            dz = weight * tl.exp(logp) * ((logp - logq) - mean_log_ratio)
        elif KIND == "forward_kl":
            dz = weight * (tl.exp(logp) - tl.exp(logq))
        else:
            # triton types a call of a jitted function as NoReturn.
            log_p_over_m, _ = _log_ratios_to_mixture(logp - logq, alpha)  # pyright: ignore[reportGeneralTypeIssues]
            dz = weight * (tl.cast(1.0, Acc) - alpha) * tl.exp(logp) * (log_p_over_m - mean_log_ratio)
        tl.store(DZ + column, tl.where(is_real, dz, tl.cast(0.0, Acc)).to(DZ.dtype.element_ty), mask=column < columns)


def divergence_(
    sums_2C: Tensor, z_CU: Tensor, t_CU: Tensor, real_columns: Tensor, normaliser_4C: Tensor, divergence: Divergence
) -> None:
    assert z_CU.stride(1) == t_CU.stride(1) == sums_2C.stride(1) == normaliser_4C.stride(1) == 1
    assert divergence.kind in KINDS
    alpha = normaliser_4C.new_full((), divergence.alpha)
    strides = (x.stride(0) for x in (sums_2C, z_CU, t_CU, normaliser_4C))
    tensors = (sums_2C, z_CU, t_CU, real_columns, normaliser_4C, alpha)
    launch(divergence_kernel, z_CU, *tensors, *strides, z_CU.shape[1], KIND=divergence.kind)


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
    assert dz_CU.stride(1) == z_CU.stride(1) == t_CU.stride(1) == normaliser_4C.stride(1) == 1
    assert mean_log_ratio_C.is_contiguous() and weight_C.is_contiguous() and divergence.kind in KINDS
    alpha = normaliser_4C.new_full((), divergence.alpha)
    strides = (x.stride(0) for x in (dz_CU, z_CU, t_CU, normaliser_4C))
    tensors = (dz_CU, z_CU, t_CU, real_columns, normaliser_4C, mean_log_ratio_C, weight_C, alpha)
    launch(divergence_dlogits_kernel, z_CU, *tensors, *strides, z_CU.shape[1], KIND=divergence.kind)
