"""Fused linear heads: log-probs, the clipped policy loss with the k2 KL, and full-vocabulary divergences, computed in
chunks so that `[tokens, vocabulary]` logits are never materialized. Depends on torch and triton alone."""

from .chunks import ChunkBudget
from .linear_kl import linear_kl
from .linear_logprob import linear_logprob
from .linear_policy_loss import linear_policy_loss
from .linear_topk_kl import linear_topk_kl
from .types import KLLoss, PolicyLoss, PolicyTerms

__all__ = [
    "ChunkBudget",
    "KLLoss",
    "PolicyLoss",
    "PolicyTerms",
    "linear_kl",
    "linear_logprob",
    "linear_policy_loss",
    "linear_topk_kl",
]
