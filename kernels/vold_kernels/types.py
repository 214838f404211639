"""What goes into and comes out of the losses. Shape letters: N packed response tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """What each token contributes. Every mask, β and the normaliser 1/Z live in the two weights.

    A token is dropped before the first matmul when both its weights are 0; a field is never read where the weight
    it belongs to is 0, so NaN is allowed there. Under tensor parallelism every rank passes the same values.
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
    """[N] log-prob under the engine that sampled, where it may hold older weights (nats): the terms of a token are
    weighted by min(exp(x − logp_rollout), importance_cap), a constant to the gradient; x is logp_old beside the ratio
    (logp where there is none), and logp in the teacher's term. None: by 1."""
    sequence_N: Tensor | None = None
    """[N] integer, the same for the tokens of a sequence, which are adjacent. Given: one ratio a sequence (GSPO)."""
    ratio_low_N: Tensor | None = None
    """[N] bounds of the ratio token by token (DCPO), instead of 1 − clip_eps_low and 1 + clip_eps_high. Both or neither."""
    ratio_high_N: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """Only `loss` carries a gradient. All are fp32 (fp64 for fp64 inputs), the counts int64; sums are over tokens."""

    loss: Tensor
    """[] pg_loss + kl_loss − entropy bonus, differentiable with respect to hidden and weight."""
    logp_N: Tensor
    """[N] log-prob of the target (nats), ≤ 0. Exactly 0 where both weights are 0: those rows are never computed."""
    entropy_N: Tensor
    """[N] entropy of the softmax at this temperature (nats). Exactly 0 where both weights are 0."""
    pg_loss: Tensor
    """[] Σ pg_weight · L_pg."""
    kl_loss: Tensor
    """[] Σ kl_weight · ½ (logp − logp_teacher)², beyond kl_clamp its linear continuation."""
    clip_count_low: Tensor
    """[] number of tokens with pg_weight ≠ 0, A < 0 and a ratio below the lower bound, which took their gradient."""
    clip_count_high: Tensor
    """[] number of tokens with pg_weight ≠ 0, A > 0 and a ratio above the upper bound, which took their gradient."""
    kl_old: Tensor
    """[] Σ (logp_old − logp) over tokens with pg_weight ≠ 0 (nats): the k1 estimate of KL(old‖now), a sum, no mean."""
    dropped_mass: Tensor
    """[] Σ|dL/dlogit| that `filter_eps` left out of the gradients, over all tokens and ranks. 0 when exact."""


@dataclass(frozen=True)
class KLLoss:
    """Only `loss` carries a gradient. All are fp32 (fp64 for fp64 inputs)."""

    loss: Tensor
    """[] Σ weight · KL, differentiable with respect to the student's hidden and weight."""
    kl_N: Tensor
    """[N] divergence (nats), ≥ 0 up to rounding. Exactly 0 where the weight is 0: those rows are never computed."""
    dropped_mass: Tensor
    """[] Σ|dL/dlogit| that `filter_eps` left out of the gradients, over all tokens and ranks. 0 when exact."""
