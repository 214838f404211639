"""Divergence of two softmaxes over the same columns: the formulas, the two row functions, and who computes them.

Shape letters: C tokens of a chunk, U vocabulary rows of this rank. `Acc` is fp32 (fp64 for fp64 inputs). p is the
student's probability of a column (a bucket of columns, under top-k), q the teacher's; m = α q + (1 − α) p.

    kind      divergence D                                own O = mean of f under p    dD/dz = p (f − O) = slope
    reverse   KL(S‖T) = Σ p log p/q                       f = log p/q, O = D           p (log p/q − O)
    forward   KL(T‖S) = Σ q log q/p                       not needed, 0                p − q
    jsd       α Σ q log q/m + (1 − α) Σ p log p/m         f = log p/m, O = KL(S‖M)     (1 − α) p (log p/m − O)

    divergence_(sums_2C, z_CU, t_CU, real, norm_4C, divergence)
        Writes this rank's part of (D, O) of each row. z and t are student and teacher logits after temperature.
    divergence_dlogits_(dz_CU, z_CU, t_CU, real, norm_4C, own_C, weight_C, divergence)
        weight · slope over z, exactly 0 in padding. dz as in `rows.py`: z itself, or a narrower dtype in its storage.

norm_4C: top and log_total of the student, then of the teacher (see `rows.Statistics`), over all ranks.
Equal logits on both sides give D = 0 and slope = 0 to the bit: every kind starts from log p − log q.
"""

import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    kind: str
    alpha: float
    """Read by jsd only."""


def pair_functions(device: torch.device) -> ModuleType:
    """Triton on a GPU and under its interpreter, plain torch otherwise."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from . import pairs_triton

        return pairs_triton
    from . import pairs_torch

    return pairs_torch


def summands(logp: Tensor, logq: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """What each column adds to (D, O)."""
    if divergence.kind == "reverse_kl":
        reverse = logp.exp() * (logp - logq)
        return reverse, reverse
    if divergence.kind == "forward_kl":
        forward = logq.exp() * (logq - logp)
        return forward, torch.zeros_like(forward)
    log_p_over_m, log_q_over_m = over_mixture(logp - logq, divergence.alpha)
    own = logp.exp() * log_p_over_m
    return divergence.alpha * logq.exp() * log_q_over_m + (1 - divergence.alpha) * own, own


def slope(logp: Tensor, logq: Tensor, own: Tensor, divergence: Divergence) -> Tensor:
    """dD/dz of each column."""
    if divergence.kind == "reverse_kl":
        return logp.exp() * ((logp - logq) - own)
    if divergence.kind == "forward_kl":
        return logp.exp() - logq.exp()
    log_p_over_m, _ = over_mixture(logp - logq, divergence.alpha)
    return (1 - divergence.alpha) * logp.exp() * (log_p_over_m - own)


def over_mixture(gap: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) from gap = log p − log q. The larger of the two is factored out of m: nothing overflows."""
    near = torch.where(gap < 0, gap.new_full((), alpha), 1 - alpha)
    log_m_over_larger = (near + (1 - near) * (-gap.abs()).exp()).log()
    return gap.clamp(max=0) - log_m_over_larger, (-gap).clamp(max=0) - log_m_over_larger
