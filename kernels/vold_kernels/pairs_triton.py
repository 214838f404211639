"""The row functions of `pairs.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there.

Why: each kernel reads the two chunks of logits once, which is what bounds it; torch would read them once per operation.
The rules are those of `rows_triton.py`: no mask where all columns are real, sums reduced over the threads once,
arithmetic in the dtype of the statistics, loads cast to it at once, and a narrower DZ never lies over a block that is
still to be read. The same functions in plain torch: `pairs_torch.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .divergence import KINDS, Divergence
from .rows_triton import exp, launch


@triton.jit
def _log_ratios_to_mixture(log_ratio, alpha):
    """(log p/m, log q/m) from log p − log q: `divergence.log_ratios_to_mixture`."""
    zero = tl.cast(0.0, log_ratio.dtype)
    one = tl.cast(1.0, log_ratio.dtype)
    larger_weight = tl.where(log_ratio < zero, alpha, one - alpha)
    log_m_over_larger = tl.log(larger_weight + (one - larger_weight) * exp(-tl.abs(log_ratio)))
    return tl.minimum(log_ratio, zero) - log_m_over_larger, tl.minimum(-log_ratio, zero) - log_m_over_larger


@triton.jit
def _summands(logp, logq, alpha, KIND: tl.constexpr):
    """Summands of (D, E_p[f]) of one column: `divergence.summands`. For jsd the first is that of KL(q‖m) alone."""
    if KIND == "reverse_kl":
        divergence = exp(logp) * (logp - logq)
        mean_log_ratio = divergence
    elif KIND == "forward_kl":
        divergence = exp(logq) * (logq - logp)
        mean_log_ratio = tl.zeros_like(divergence)
    else:
        # triton types a call of a jitted function as NoReturn.
        log_p_over_m, log_q_over_m = _log_ratios_to_mixture(logp - logq, alpha)  # pyright: ignore[reportGeneralTypeIssues]
        mean_log_ratio = exp(logp) * log_p_over_m
        divergence = exp(logq) * log_q_over_m
    return divergence, mean_log_ratio


@triton.jit
def _derivative(logp, logq, mean_log_ratio, alpha, KIND: tl.constexpr):
    """dD/dz of one column: `divergence.derivative`."""
    if KIND == "reverse_kl":
        derivative = exp(logp) * ((logp - logq) - mean_log_ratio)
    elif KIND == "forward_kl":
        derivative = exp(logp) - exp(logq)
    else:
        # triton types a call of a jitted function as NoReturn.
        log_p_over_m, _ = _log_ratios_to_mixture(logp - logq, alpha)  # pyright: ignore[reportGeneralTypeIssues]
        derivative = (tl.cast(1.0, logp.dtype) - alpha) * exp(logp) * (log_p_over_m - mean_log_ratio)
    return derivative


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
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns).to(tl.int32)
    row_max = tl.load(NORMALISER)
    log_sum = tl.load(NORMALISER + normaliser_stride)
    teacher_max = tl.load(NORMALISER + 2 * normaliser_stride)
    teacher_log_sum = tl.load(NORMALISER + 3 * normaliser_stride)
    alpha = tl.load(ALPHA)
    offset = tl.arange(0, BLOCK)
    divergence_B = tl.zeros((BLOCK,), Acc)
    mean_log_ratio_B = tl.zeros((BLOCK,), Acc)
    whole = real_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        logp = (tl.load(Z + start + offset).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + start + offset).to(Acc) - teacher_max) - teacher_log_sum
        d_B, r_B = _summands(logp, logq, alpha, KIND)
        divergence_B += d_B
        mean_log_ratio_B += r_B
    if whole < real_columns:
        is_real = whole + offset < real_columns
        logp = (tl.load(Z + whole + offset, mask=is_real, other=0.0).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + whole + offset, mask=is_real, other=0.0).to(Acc) - teacher_max) - teacher_log_sum
        d_B, r_B = _summands(logp, logq, alpha, KIND)
        divergence_B += tl.where(is_real, d_B, tl.cast(0.0, Acc))
        mean_log_ratio_B += tl.where(is_real, r_B, tl.cast(0.0, Acc))
    divergence = tl.sum(divergence_B, 0)
    mean_log_ratio = tl.sum(mean_log_ratio_B, 0)
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
    real_columns = tl.minimum(tl.load(REAL_COLUMNS), columns).to(tl.int32)
    row_max = tl.load(NORMALISER)
    log_sum = tl.load(NORMALISER + normaliser_stride)
    teacher_max = tl.load(NORMALISER + 2 * normaliser_stride)
    teacher_log_sum = tl.load(NORMALISER + 3 * normaliser_stride)
    mean_log_ratio = tl.load(MEAN_LOG_RATIO + row)
    weight = tl.load(WEIGHT + row)
    alpha = tl.load(ALPHA)
    offset = tl.arange(0, BLOCK)
    whole = real_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        logp = (tl.load(Z + start + offset).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + start + offset).to(Acc) - teacher_max) - teacher_log_sum
        tl.debug_barrier()  # see dlogits_kernel
        dz = weight * _derivative(logp, logq, mean_log_ratio, alpha, KIND)
        tl.store(DZ + start + offset, dz.to(DZ.dtype.element_ty))
    for start in range(whole, columns, BLOCK):
        column = start + offset
        is_real = column < real_columns
        logp = (tl.load(Z + column, mask=is_real, other=0.0).to(Acc) - row_max) - log_sum
        logq = (tl.load(T + column, mask=is_real, other=0.0).to(Acc) - teacher_max) - teacher_log_sum
        tl.debug_barrier()
        dz = weight * _derivative(logp, logq, mean_log_ratio, alpha, KIND)
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
