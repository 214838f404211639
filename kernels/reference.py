"""The specification, in plain torch: logits are materialised, autograd does the rest, nothing is clever.

Shape letters: N tokens, D hidden, V vocabulary rows, n tokens that carry weight. Computes in fp32, or in fp64 when
given fp64. The formulas are those of VOLD (L_pg, L_kl) with the weights pulled out; see `linear_policy_loss.py`.
"""

import torch
from torch import Tensor

from .records import PolicyLoss, PolicyTerms


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    vocab_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    weight_VD = weight_VD[:vocab_size]
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T / temperature
    logp_NV = logits_NV.log_softmax(dim=-1)
    logp_N = logp_NV.gather(1, target_N[:, None])[:, 0]
    if not return_entropy:
        return logp_N
    return logp_N, -(logp_NV.exp() * logp_NV).sum(dim=-1)


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    terms: PolicyTerms,
    *,
    eps_low: float,
    eps_high: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> PolicyLoss:
    has_pg_N, has_kl_N = terms.pg_weight_N != 0, terms.kl_weight_N != 0
    kept_N = has_pg_N | has_kl_N
    logp_n, entropy_n = linear_logprob(
        hidden_ND[kept_N],
        weight_VD,
        target_N[kept_N],
        temperature=temperature,
        return_entropy=True,
        vocab_size=vocab_size,
    )
    dtype = logp_n.dtype
    logp_N = logp_n.new_zeros(len(target_N)).masked_scatter(kept_N, logp_n)
    entropy_N = logp_n.new_zeros(len(target_N)).masked_scatter(kept_N, entropy_n.detach())

    logp_pg, advantage = logp_N[has_pg_N], terms.advantage_N[has_pg_N].to(dtype)
    logp_old = logp_pg.detach() if terms.logp_old_N is None else terms.logp_old_N[has_pg_N].to(dtype)
    ratio = (logp_pg - logp_old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    pg_loss = -(terms.pg_weight_N[has_pg_N].to(dtype) * surrogate).sum()

    kl_loss = torch.zeros_like(pg_loss)
    if terms.logp_teacher_N is not None:
        gap = logp_N[has_kl_N] - terms.logp_teacher_N[has_kl_N].to(dtype)
        kl_loss = (terms.kl_weight_N[has_kl_N].to(dtype) * gap.square() / 2).sum()
    return PolicyLoss(
        loss=pg_loss + kl_loss,
        logp_N=logp_N.detach(),
        entropy_N=entropy_N,
        pg_loss=pg_loss.detach(),
        kl_loss=kl_loss.detach(),
        clip_low=((ratio < 1 - eps_low) & (advantage < 0)).sum(),
        clip_high=((ratio > 1 + eps_high) & (advantage > 0)).sum(),
        kl_old=(logp_old - logp_pg.detach()).sum(),
    )
