"""The row functions of `pairs.py` as Triton kernels: one program per token, columns in blocks. Shape letters as there.

Both are bound by reading the two chunks of logits. They obey the rules of `rows_triton.py`: arithmetic in the dtype of
the statistics, loads cast to it at once, and a narrower DZ never lies over a block that is still to be read.
"""

import triton
import triton.language as tl
from torch import Tensor

from .pairs import KINDS, Divergence
from .rows_triton import BLOCK, WARPS, _on


@triton.jit
def _over_mixture(gap, alpha):
    """(log p/m, log q/m) from gap = log p − log q: `pairs.over_mixture`."""
    zero = tl.cast(0.0, gap.dtype)
    one = tl.cast(1.0, gap.dtype)
    near = tl.where(gap < zero, alpha, one - alpha)
    log_m_over_larger = tl.log(near + (one - near) * tl.exp(-tl.abs(gap)))
    return tl.minimum(gap, zero) - log_m_over_larger, tl.minimum(-gap, zero) - log_m_over_larger


@triton.jit
def divergence_kernel(
    SUMS,  # [2, C] Acc, row stride sums_stride: D, O; written
    Z,  # [C, U] Acc, row stride z_stride
    T,  # [C, U] Acc, row stride t_stride
    REAL,  # [] int64, real columns of the rank
    NORM,  # [4, C] Acc, row stride norm_stride: top, log_total of the student, then of the teacher
    ALPHA,  # [] Acc, read by jsd only
    sums_stride,
    z_stride,
    t_stride,
    norm_stride,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Acc = Z.dtype.element_ty
    Z += row * z_stride
    T += row * t_stride
    NORM += row
    real = tl.minimum(tl.load(REAL), columns)
    top = tl.load(NORM)
    log_total = tl.load(NORM + norm_stride)
    teacher_top = tl.load(NORM + 2 * norm_stride)
    teacher_log_total = tl.load(NORM + 3 * norm_stride)
    zero = tl.cast(0.0, Acc)
    alpha = tl.load(ALPHA)
    divergence = zero
    own = zero
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < real
        logp = (tl.load(Z + column, mask=here, other=0.0).to(Acc) - top) - log_total
        logq = (tl.load(T + column, mask=here, other=0.0).to(Acc) - teacher_top) - teacher_log_total
        if KIND == "reverse_kl":
            divergence += tl.sum(tl.where(here, tl.exp(logp) * (logp - logq), zero), 0)
        elif KIND == "forward_kl":
            divergence += tl.sum(tl.where(here, tl.exp(logq) * (logq - logp), zero), 0)
        else:
            log_p_over_m, log_q_over_m = _over_mixture(logp - logq, alpha)
            own += tl.sum(tl.where(here, tl.exp(logp) * log_p_over_m, zero), 0)
            divergence += tl.sum(tl.where(here, tl.exp(logq) * log_q_over_m, zero), 0)
    if KIND == "reverse_kl":
        own = divergence
    if KIND == "jsd":
        divergence = alpha * divergence + (tl.cast(1.0, Acc) - alpha) * own
    tl.store(SUMS + row, divergence)
    tl.store(SUMS + sums_stride + row, own)


@triton.jit
def divergence_dlogits_kernel(
    DZ,  # [C, U] Acc or bf16, row stride dz_stride; may alias Z, each row from the same byte on
    Z,  # [C, U] Acc, row stride z_stride
    T,  # [C, U] Acc, row stride t_stride
    REAL,  # [] int64, real columns of the rank
    NORM,  # [4, C] Acc, row stride norm_stride: top, log_total of the student, then of the teacher
    OWN,  # [C] Acc
    WEIGHT,  # [C] Acc
    ALPHA,  # [] Acc, read by jsd only
    dz_stride,
    z_stride,
    t_stride,
    norm_stride,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Acc = Z.dtype.element_ty
    Z += row * z_stride
    T += row * t_stride
    DZ += row * dz_stride
    NORM += row
    real = tl.minimum(tl.load(REAL), columns)
    top = tl.load(NORM)
    log_total = tl.load(NORM + norm_stride)
    teacher_top = tl.load(NORM + 2 * norm_stride)
    teacher_log_total = tl.load(NORM + 3 * norm_stride)
    own = tl.load(OWN + row)
    weight = tl.load(WEIGHT + row)
    alpha = tl.load(ALPHA)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < real
        logp = (tl.load(Z + column, mask=here, other=0.0).to(Acc) - top) - log_total
        logq = (tl.load(T + column, mask=here, other=0.0).to(Acc) - teacher_top) - teacher_log_total
        tl.debug_barrier()  # see dlogits_kernel
        if KIND == "reverse_kl":
            dz = weight * tl.exp(logp) * ((logp - logq) - own)
        elif KIND == "forward_kl":
            dz = weight * (tl.exp(logp) - tl.exp(logq))
        else:
            log_p_over_m, _ = _over_mixture(logp - logq, alpha)
            dz = weight * (tl.cast(1.0, Acc) - alpha) * tl.exp(logp) * (log_p_over_m - own)
        tl.store(DZ + column, tl.where(here, dz, tl.cast(0.0, Acc)).to(DZ.dtype.element_ty), mask=column < columns)


def divergence_(
    sums_2C: Tensor, z_CU: Tensor, t_CU: Tensor, real: Tensor, norm_4C: Tensor, divergence: Divergence
) -> None:
    tokens, columns = z_CU.shape
    assert z_CU.stride(1) == t_CU.stride(1) == sums_2C.stride(1) == norm_4C.stride(1) == 1
    assert divergence.kind in KINDS
    if tokens:
        with _on(z_CU):
            divergence_kernel[(tokens,)](
                sums_2C,
                z_CU,
                t_CU,
                real,
                norm_4C,
                norm_4C.new_full((), divergence.alpha),
                sums_2C.stride(0),
                z_CU.stride(0),
                t_CU.stride(0),
                norm_4C.stride(0),
                columns,
                KIND=divergence.kind,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def divergence_dlogits_(
    dz_CU: Tensor,
    z_CU: Tensor,
    t_CU: Tensor,
    real: Tensor,
    norm_4C: Tensor,
    own_C: Tensor,
    weight_C: Tensor,
    divergence: Divergence,
) -> None:
    tokens, columns = z_CU.shape
    assert dz_CU.stride(1) == z_CU.stride(1) == t_CU.stride(1) == norm_4C.stride(1) == 1
    assert own_C.is_contiguous() and weight_C.is_contiguous() and divergence.kind in KINDS
    if tokens:
        with _on(z_CU):
            divergence_dlogits_kernel[(tokens,)](
                dz_CU,
                z_CU,
                t_CU,
                real,
                norm_4C,
                own_C,
                weight_C,
                norm_4C.new_full((), divergence.alpha),
                dz_CU.stride(0),
                z_CU.stride(0),
                t_CU.stride(0),
                norm_4C.stride(0),
                columns,
                KIND=divergence.kind,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
