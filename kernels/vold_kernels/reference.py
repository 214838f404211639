"""The specification in plain torch: logits are materialised and autograd computes the gradients. Simple, not fast.

Shape letters: N tokens, D hidden, V vocabulary rows, n tokens that carry weight. Computes in fp32, or in fp64 when
given fp64. The formulas are those at the top of `linear_policy_loss.py` (L_pg and L_kl of VOLD, Eqs. 5 and 6, with
weights per token) and of `linear_kl.py`. Arguments and results are those of the functions of the same names there.
"""

import math

import torch
from torch import Tensor

from .qkv import Heads, SharedKeys
from .types import KLLoss, PolicyLoss, PolicyTerms


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    vocab_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target token (nats), with return_entropy also the entropies."""
    logp_NV = _log_softmax(hidden_ND, weight_VD[:vocab_size], temperature)
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
    clip_eps_low: float,
    clip_eps_high: float,
    importance_cap: float = 2.0,
    entropy_bonus: float = 0.0,
    kl_clamp: float = math.inf,
    surrogate: str = "clip",
    gate_temperatures: tuple[float, float] = (1.05, 1.0),
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> PolicyLoss:
    """Clipped policy loss plus k2 distillation."""
    has_pg_N, has_kl_N = terms.pg_weight_N != 0, terms.kl_weight_N != 0
    has_reference_N = torch.zeros_like(has_pg_N) if terms.reference_weight_N is None else terms.reference_weight_N != 0
    kept_N = has_pg_N | has_kl_N | has_reference_N
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
    entropy_N = logp_n.new_zeros(len(target_N)).masked_scatter(kept_N, entropy_n)

    def importance(logp: Tensor, has_N: Tensor) -> Tensor | float:
        if terms.logp_rollout_N is None:
            return 1.0
        return (logp.detach() - terms.logp_rollout_N[has_N].to(dtype)).exp().clamp(max=importance_cap)

    logp_pg, advantage = logp_N[has_pg_N], terms.advantage_N[has_pg_N].to(dtype)
    logp_old = logp_pg.detach() if terms.logp_old_N is None else terms.logp_old_N[has_pg_N].to(dtype)
    log_ratio, pg_weight = logp_pg - logp_old, terms.pg_weight_N[has_pg_N].to(dtype)
    if terms.sequence_N is not None:
        sequence = terms.sequence_N[has_pg_N]
        log_ratio = torch.stack([log_ratio[sequence == s].mean() for s in sequence]) if len(sequence) else log_ratio
    ratio = log_ratio.exp()
    low, high = torch.full_like(ratio, 1 - clip_eps_low), torch.full_like(ratio, 1 + clip_eps_high)
    if terms.ratio_low_N is not None and terms.ratio_high_N is not None:
        low, high = terms.ratio_low_N[has_pg_N].to(dtype), terms.ratio_high_N[has_pg_N].to(dtype)
    is_low, is_high = ratio < low, ratio > high
    if surrogate == "clip":
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        is_low, is_high = is_low & (advantage < 0), is_high & (advantage > 0)
    elif surrogate == "constant-ratio":
        gain = ratio.clamp(low, high).detach() * advantage * logp_pg
    else:
        low_temperature, high_temperature = (torch.full_like(advantage, value) for value in gate_temperatures)
        temperatures = torch.where(advantage > 0, high_temperature, low_temperature)
        gain = 4 / temperatures * torch.sigmoid(temperatures * (ratio - 1)) * advantage
        is_low = is_high = torch.zeros_like(is_low)
    pg_loss = -(importance(logp_old, has_pg_N) * pg_weight * gain).sum()
    bonus = entropy_bonus * (pg_weight * entropy_N[has_pg_N]).sum()

    kl_loss = torch.zeros_like(pg_loss)
    if terms.logp_teacher_N is not None:
        gap = logp_N[has_kl_N] - terms.logp_teacher_N[has_kl_N].to(dtype)
        beyond = (gap.abs() - kl_clamp).clamp(min=0)  # Huber: ½ gap² up to the clamp, a line of slope kl_clamp after it
        kl_weight = importance(logp_N[has_kl_N], has_kl_N) * terms.kl_weight_N[has_kl_N].to(dtype)
        kl_loss = (kl_weight * (gap.square() - beyond.square()) / 2).sum()
    reference_loss = torch.zeros_like(pg_loss)
    if terms.logp_reference_N is not None and terms.reference_weight_N is not None:
        logp = logp_N[has_reference_N]
        x = terms.logp_reference_N[has_reference_N].to(dtype) - logp
        weight = importance(logp, has_reference_N) * terms.reference_weight_N[has_reference_N].to(dtype)
        reference_loss = (weight * (x.exp() - 1 - x)).sum()
    return PolicyLoss(
        loss=pg_loss + kl_loss - bonus + reference_loss,
        logp_N=logp_N.detach(),
        entropy_N=entropy_N.detach(),
        pg_loss=pg_loss.detach(),
        kl_loss=kl_loss.detach(),
        clip_count_low=is_low.sum(),
        clip_count_high=is_high.sum(),
        kl_old=(logp_old - logp_pg.detach()).sum(),
        dropped_mass=torch.zeros_like(pg_loss),
        reference_loss=reference_loss.detach(),
    )


def linear_kl(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    weight_N: Tensor,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    top_k: int | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> KLLoss:
    """Σ weight · divergence between student and teacher."""
    kept_N = weight_N != 0
    logp_student = _log_softmax(student_hidden_ND[kept_N], student_weight_VD[:vocab_size], temperature)
    logp_teacher = _log_softmax(teacher_hidden_NE[kept_N], teacher_weight_VE[:vocab_size], temperature).detach()
    if top_k is not None and top_k < logp_student.shape[1]:
        top_nk = logp_student.topk(top_k).indices
        logp_student, logp_teacher = (_top_and_tail(logp, top_nk) for logp in (logp_student, logp_teacher))
    kl_n = _divergence(logp_student, logp_teacher, divergence, alpha)
    return _kl_loss(kl_n, weight_N)


def linear_topk_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    id_Nk: Tensor,
    logp_teacher_Nk: Tensor,
    *,
    weight_N: Tensor,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> KLLoss:
    """Σ weight · divergence between the student and a teacher's top k with one bucket for the rest; every id is one."""
    kept_N = weight_N != 0
    logp_student = _log_softmax(hidden_ND[kept_N], weight_VD[:vocab_size], temperature)
    logp_student = _top_and_tail(logp_student, id_Nk[kept_N].long())
    top = logp_teacher_Nk[kept_N].to(logp_student.dtype)
    logp_teacher = torch.cat((top, torch.log1p(-top.exp().sum(dim=1, keepdim=True))), dim=1)
    return _kl_loss(_divergence(logp_student, logp_teacher, divergence, alpha), weight_N)


def _kl_loss(kl_n: Tensor, weight_N: Tensor) -> KLLoss:
    kept_N = weight_N != 0
    kl_N = kl_n.new_zeros(len(weight_N)).masked_scatter(kept_N, kl_n)
    loss = (weight_N[kept_N].to(kl_n.dtype) * kl_n).sum()
    return KLLoss(loss=loss, kl_N=kl_N.detach(), dropped_mass=torch.zeros_like(loss))


def _divergence(logp_student: Tensor, logp_teacher: Tensor, divergence: str, alpha: float) -> Tensor:
    """[n] over columns or buckets."""
    if divergence == "reverse_kl":
        return _kl(logp_student, logp_teacher)
    if divergence == "forward_kl":
        return _kl(logp_teacher, logp_student)
    mixture = torch.logaddexp(logp_teacher + math.log(alpha), logp_student + math.log(1 - alpha))
    return alpha * _kl(logp_teacher, mixture) + (1 - alpha) * _kl(logp_student, mixture)


def _log_softmax(hidden_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    return (hidden_ND.to(dtype) @ weight_VD.to(dtype).T / temperature).log_softmax(dim=-1)


def _top_and_tail(logp_nV: Tensor, top_nk: Tensor) -> Tensor:
    """[n, k + 1] log-probs at the given columns, and of all other columns as one bucket."""
    others_nV = logp_nV.scatter(1, top_nk, float("-inf"))
    return torch.cat((logp_nV.gather(1, top_nk), others_nV.logsumexp(dim=1, keepdim=True)), dim=1)


def _kl(logp_nB: Tensor, other_nB: Tensor) -> Tensor:
    """[n] KL(p‖other) over B columns or buckets."""
    return (logp_nB.exp() * (logp_nB - other_nB)).sum(dim=1)


# -- a layer's pieces --------------------------------------------------------------------------------------------------


def qkv_norm_rope(
    mixed_TW: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos_sin_2TH: Tensor,
    heads: Heads,
    shared: SharedKeys | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv.qkv_norm_rope`."""
    mixed = mixed_TW.view(len(mixed_TW), heads.keys, -1, heads.width)
    q_TAH, k_TKH, v_TKH = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    if weights is not None and heads.eps is not None:
        q_TAH, k_TKH = (rms_norm(x, w, heads.eps) for x, w in zip((q_TAH, k_TKH), weights, strict=True))
    cos_T1H, sin_T1H = cos_sin_2TH.to(mixed_TW.dtype)[:, :, None]
    q_TAH, k_TKH = (x * cos_T1H + _rotated_by_90_degrees(x) * sin_T1H for x in (q_TAH, k_TKH))
    return (q_TAH, k_TKH, v_TKH) if shared is None else (q_TAH, k_TKH[shared.index_S], v_TKH[shared.index_S])


def _rotated_by_90_degrees(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in fp32 at least, rounded to x's dtype, then times the weight, as in transformers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_norm.add_rms_norm`."""
    total = x + residual
    return total, rms_norm(total, weight, eps)
