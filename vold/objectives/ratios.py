"""Importance ratios of the policy gradient, their bounds, and what becomes of a ratio far from 1. N: tokens of a
micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Bounds = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
"""(logp_old_N, clip_eps_low, clip_eps_high) -> (ratio_low_N, ratio_high_N), the clip range of each token"""


@dataclass(frozen=True)
class Ratio:
    """An importance ratio pi / pi_old.

    couples_tokens   one ratio for all tokens of a sequence, exp of their mean log-ratio; else one for each token
    bounds           clip range of each token; None: [1 - clip_eps_low, 1 + clip_eps_high] for all
    surrogate        "clip": a token whose ratio leaves the range loses its gradient (PPO);
                     "constant-ratio": its weight is the bound (CISPO, arXiv 2506.13585); "gate": its gradient
                     fades, without a range (SAPO, arXiv 2511.20347). Formulas: vold_kernels.linear_policy_loss
    """

    couples_tokens: bool = False
    bounds: Bounds | None = None
    surrogate: str = "clip"


def adaptive_bounds(logp_old_N: Tensor, clip_eps_low: float, clip_eps_high: float) -> tuple[Tensor, Tensor]:
    """DCPO's dynamic clip range, with q the old probability:

        1/2 + 1/2 sqrt(max(1 - 4 clip_eps_low / q, 0)) <= ratio <= 1/2 + 1/2 sqrt(1 + 4 clip_eps_high / q)

    A rare token can gain much, and lose at most half of its probability.
    """
    inverse_N = (-logp_old_N).exp()  # infinite for a q of 0: bounds 1/2 and infinity
    low_N = 0.5 + 0.5 * (1 - 4 * clip_eps_low * inverse_N).clamp(min=0).sqrt()
    return low_N, 0.5 + 0.5 * (1 + 4 * clip_eps_high * inverse_N).sqrt()


TOKEN = Ratio()
SEQUENCE = Ratio(couples_tokens=True)
ADAPTIVE = Ratio(bounds=adaptive_bounds)
CONSTANT = Ratio(surrogate="constant-ratio")
GATED = Ratio(surrogate="gate")
RATIOS: dict[str, Ratio] = {
    "token": TOKEN,
    "sequence": SEQUENCE,
    "adaptive": ADAPTIVE,
    "constant": CONSTANT,
    "gated": GATED,
}
