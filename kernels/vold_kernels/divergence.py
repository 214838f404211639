"""Divergences of two softmaxes over the same columns, and their derivatives with respect to the student's logits.

p is the student's probability of a column (of a bucket of columns, under top-k), q the teacher's;
m = α q + (1 − α) p; E_p[f] = Σ p f over the columns.

    kind         divergence D                              f           E_p[f]       dD/dz of the student's logit
    reverse_kl   KL(S‖T) = Σ p log p/q                     log p/q     D            p (f − E_p[f])
    forward_kl   KL(T‖S) = Σ q log q/p                     –           0 (unused)   p − q
    jsd          α Σ q log q/m + (1 − α) Σ p log p/m       log p/m     KL(S‖M)      (1 − α) p (f − E_p[f])

Equal logits on both sides give D = 0 and dD/dz = 0 to the bit: every kind starts from log p − log q.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    """One of `KINDS` and its parameter."""

    kind: str
    alpha: float
    """The teacher's share of the mixture M, in (0, 1). Used by jsd only."""


def summands(logp: Tensor, logq: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The terms of each column in the sums (D, E_p[f])."""
    if divergence.kind == "reverse_kl":
        reverse = logp.exp() * (logp - logq)
        return reverse, reverse
    if divergence.kind == "forward_kl":
        forward = logq.exp() * (logq - logp)
        return forward, torch.zeros_like(forward)
    log_p_over_m, log_q_over_m = log_ratios_to_mixture(logp - logq, divergence.alpha)
    student_kl = logp.exp() * log_p_over_m
    return divergence.alpha * logq.exp() * log_q_over_m + (1 - divergence.alpha) * student_kl, student_kl


def derivative(logp: Tensor, logq: Tensor, mean_log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """dD/dz of each column. mean_log_ratio is the token's E_p[f]."""
    if divergence.kind == "reverse_kl":
        return logp.exp() * ((logp - logq) - mean_log_ratio)
    if divergence.kind == "forward_kl":
        return logp.exp() - logq.exp()
    log_p_over_m, _ = log_ratios_to_mixture(logp - logq, divergence.alpha)
    return (1 - divergence.alpha) * logp.exp() * (log_p_over_m - mean_log_ratio)


def log_ratios_to_mixture(log_ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) from log p − log q. The larger of p and q is factored out of m, so that nothing overflows."""
    larger_weight = torch.where(log_ratio < 0, log_ratio.new_full((), alpha), 1 - alpha)
    log_m_over_larger = (larger_weight + (1 - larger_weight) * (-log_ratio.abs()).exp()).log()
    return log_ratio.clamp(max=0) - log_m_over_larger, (-log_ratio).clamp(max=0) - log_m_over_larger
