"""Inputs and results of the losses. Shape letters: N packed response tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """Per-token inputs of the policy loss. Masks, β and the normaliser 1/Z are factors of the two weights.

    A token is dropped before the first matmul when all its weights are 0; a field is never used where the weight of
    its term is 0, so it may hold NaN there. Under tensor parallelism every rank passes the same values.
    """

    logp_old_N: Tensor | None
    """[N] log-prob under the policy before this update (nats). None: strictly on-policy, the ratio is exactly 1."""
    logp_teacher_N: Tensor | None
    """[N] log-prob under the teacher (nats). None: every kl_weight is 0 (where one is not, the loss is NaN)."""
    advantage_N: Tensor
    """[N] advantage A."""
    pg_weight_N: Tensor
    """[N] weight of the clipped surrogate."""
    kl_weight_N: Tensor
    """[N] weight of ½ (logp − logp_teacher)²."""
    logp_rollout_N: Tensor | None = None
    """[N] log-prob under the engine that sampled the token (nats), for truncated importance sampling: both weights are
    multiplied by min(exp(x − logp_rollout), importance_cap), a constant to the gradient. x is logp_old in the policy's
    term (logp where there is none) and logp in those of teacher and reference. None: no factor."""
    sequence_N: Tensor | None = None
    """[N] integer, equal for the tokens of a sequence, which are adjacent: one ratio per sequence (GSPO). None: one
    ratio per token."""
    ratio_low_N: Tensor | None = None
    """[N] lower bound of each token's ratio (DCPO), instead of 1 − clip_eps_low. Needs ratio_high_N."""
    ratio_high_N: Tensor | None = None
    """[N] upper bound of each token's ratio (DCPO), instead of 1 + clip_eps_high. Needs ratio_low_N."""
    logp_reference_N: Tensor | None = None
    """[N] log-prob under a frozen reference (nats). Needs reference_weight_N."""
    reference_weight_N: Tensor | None = None
    """[N] weight of exp(x) − 1 − x with x = logp_reference − logp (k3). Needs logp_reference_N."""


@dataclass(frozen=True)
class PolicyLoss:
    """Result of `linear_policy_loss`: fp32 (fp64 for fp64 inputs), the counts int64. Only `loss` carries a gradient."""

    loss: Tensor
    """[] pg_loss + kl_loss + reference_loss − entropy bonus, differentiable with respect to hidden and weight."""
    logp_N: Tensor
    """[N] log-prob of the target (nats), ≤ 0. Exactly 0 where all weights are 0: those rows are never computed."""
    entropy_N: Tensor
    """[N] entropy of the softmax at this temperature (nats). Exactly 0 where all weights are 0."""
    pg_loss: Tensor
    """[] Σ pg_weight · L_pg."""
    kl_loss: Tensor
    """[] Σ kl_weight · ½ (logp − logp_teacher)², beyond kl_clamp its linear continuation."""
    clip_count_low: Tensor
    """[] tokens without a policy gradient because A < 0 and their ratio is below the lower bound (pg_weight ≠ 0)."""
    clip_count_high: Tensor
    """[] tokens without a policy gradient because A > 0 and their ratio is above the upper bound (pg_weight ≠ 0)."""
    kl_old: Tensor
    """[] Σ (logp_old − logp) over tokens with pg_weight ≠ 0 (nats): k1 estimate of KL(old‖new), a sum, not a mean."""
    dropped_mass: Tensor
    """[] Σ|dL/dlogit| that `filter_eps` left out of the gradients, over all tokens and ranks. 0 with filter_eps = 0."""
    reference_loss: Tensor
    """[] Σ reference_weight · k3."""


@dataclass(frozen=True)
class KLLoss:
    """Result of `linear_kl`: fp32 (fp64 for fp64 inputs). Only `loss` carries a gradient."""

    loss: Tensor
    """[] Σ weight · KL, differentiable with respect to the student's hidden and weight."""
    kl_N: Tensor
    """[N] divergence (nats), ≥ 0 up to rounding. Exactly 0 where the weight is 0: those rows are never computed."""
    dropped_mass: Tensor
    """[] Σ|dL/dlogit| that `filter_eps` left out of the gradients, over all tokens and ranks. 0 with filter_eps = 0."""
