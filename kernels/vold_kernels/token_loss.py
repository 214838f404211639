"""Loss of each token, and its derivative with respect to the token's log-prob: formulas in `linear_policy_loss.py`.

Shape letters: N tokens, n tokens that carry weight, C tokens of a chunk of them, S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .softmax import SoftmaxStatistics
from .types import PolicyTerms


@dataclass(frozen=True)
class LossNumbers:
    """The numbers of `linear_policy_loss` that its formulas contain."""

    clip_eps_low: float
    clip_eps_high: float
    importance_cap: float
    entropy_bonus: float
    kl_clamp: float
    gate_temperature_low: float
    gate_temperature_high: float
    surrogate: str


@dataclass(frozen=True)
class KeptTerms:
    """`PolicyTerms` of tokens that carry weight, [C] each, with 0 where a field's own weight is 0."""

    logp_old_C: Tensor | None
    logp_teacher_C: Tensor
    advantage_C: Tensor
    pg_weight_C: Tensor
    kl_weight_C: Tensor
    logp_rollout_C: Tensor | None
    sequence_C: Tensor | None
    ratio_low_C: Tensor | None
    ratio_high_C: Tensor | None
    logp_reference_C: Tensor | None
    reference_weight_C: Tensor | None

    def select(self, chunk: slice) -> "KeptTerms":
        """The terms of some tokens."""
        return replace(self, **{name: value[chunk] for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class TokenLosses:
    """Losses and statistics of tokens that carry weight, [C] each."""

    logp: Tensor
    entropy: Tensor
    pg_loss: Tensor
    kl_loss: Tensor
    bonus: Tensor
    """entropy_bonus · pg_weight · entropy."""
    d_logp: Tensor
    """Derivative of the token's loss with respect to its log-prob."""
    clipped_low: Tensor
    """bool, counted in `PolicyLoss.clip_count_low`."""
    clipped_high: Tensor
    """bool, counted in `PolicyLoss.clip_count_high`."""
    kl_old: Tensor
    """logp_old − logp where pg_weight ≠ 0, else 0."""
    reference_loss: Tensor


def token_losses(
    statistics: SoftmaxStatistics,
    terms: KeptTerms,
    numbers: LossNumbers,
    sequence_group: dist.ProcessGroup | None = None,
) -> TokenLosses:
    """Loss of each token and its derivative by its log-prob. `terms` with sequence_C must hold all kept tokens of this
    rank; sequence_group: the ranks with others of the same sequences, all of which call."""
    logp_C = statistics.logp_C
    pg_weight_C, kl_weight_C, reference_weight_C = terms.pg_weight_C, terms.kl_weight_C, terms.reference_weight_C
    has_pg_C = pg_weight_C != 0
    if terms.logp_rollout_C is not None:
        logp_old_C = logp_C if terms.logp_old_C is None else terms.logp_old_C
        pg_weight_C = pg_weight_C * _importance_weight(logp_old_C, terms.logp_rollout_C, numbers)
        importance_C = _importance_weight(logp_C, terms.logp_rollout_C, numbers)
        kl_weight_C = kl_weight_C * importance_C
        reference_weight_C = None if reference_weight_C is None else reference_weight_C * importance_C
    log_ratio_C = torch.zeros_like(logp_C) if terms.logp_old_C is None else logp_C - terms.logp_old_C
    log_ratio_C = torch.where(has_pg_C, log_ratio_C, 0.0)
    sequences = None
    if terms.sequence_C is not None:
        sequences = _Sequences.of(terms.sequence_C, has_pg_C.to(logp_C), sequence_group)
    if sequences is not None:
        log_ratio_C = sequences.mean(log_ratio_C)
    surrogate = SURROGATES[numbers.surrogate](log_ratio_C.exp(), logp_C, terms, numbers)
    d_pg_C = -pg_weight_C * surrogate.d_log_ratio
    if sequences is not None:  # every token's log-prob is in the ratio of all tokens of its sequence
        d_pg_C = torch.where(has_pg_C, sequences.mean(d_pg_C), 0.0)
    gap_C = torch.where(terms.kl_weight_C != 0, logp_C - terms.logp_teacher_C, 0.0)
    clamped_gap_C = gap_C.clamp(-numbers.kl_clamp, numbers.kl_clamp)
    d_logp_C = kl_weight_C * clamped_gap_C + d_pg_C
    reference_loss_C = torch.zeros_like(logp_C)
    if reference_weight_C is not None and terms.logp_reference_C is not None:
        gain_C = torch.where(terms.reference_weight_C != 0, terms.logp_reference_C - logp_C, 0.0)
        reference_loss_C = reference_weight_C * (gain_C.expm1() - gain_C)
        d_logp_C = d_logp_C - reference_weight_C * gain_C.expm1()
    return TokenLosses(
        logp=logp_C,
        entropy=statistics.entropy_C,
        pg_loss=-pg_weight_C * surrogate.value,
        kl_loss=kl_weight_C * clamped_gap_C * (gap_C - clamped_gap_C / 2),
        bonus=numbers.entropy_bonus * terms.pg_weight_C * statistics.entropy_C,
        d_logp=d_logp_C,
        clipped_low=surrogate.clipped_low & has_pg_C,
        clipped_high=surrogate.clipped_high & has_pg_C,
        kl_old=torch.where(has_pg_C, -log_ratio_C, 0.0),
        reference_loss=reference_loss_C,
    )


def _importance_weight(logp_C: Tensor, logp_rollout_C: Tensor, numbers: LossNumbers) -> Tensor:
    """Truncated importance sampling: min(exp(logp − logp_rollout), importance_cap)."""
    return (logp_C - logp_rollout_C).exp().clamp(max=numbers.importance_cap)


@dataclass(frozen=True)
class Surrogate:
    """What the policy gradient maximises, [C] each."""

    value: Tensor
    d_log_ratio: Tensor
    """Derivative of `value` with respect to log ρ (with respect to logp where ρ is a constant to the gradient)."""
    clipped_low: Tensor
    """bool"""
    clipped_high: Tensor
    """bool"""


def _clip(ratio_C: Tensor, logp_C: Tensor, terms: KeptTerms, numbers: LossNumbers) -> Surrogate:
    """min(ρ A, clip(ρ) A) (PPO)."""
    advantage_C = terms.advantage_C
    unclipped_C = ratio_C * advantage_C
    clipped_C = _clipped_ratio(ratio_C, terms, numbers) * advantage_C
    is_clipped_C = clipped_C < unclipped_C
    return Surrogate(
        value=torch.minimum(unclipped_C, clipped_C),
        d_log_ratio=torch.where(is_clipped_C, 0.0, unclipped_C),
        clipped_low=is_clipped_C & (advantage_C < 0),
        clipped_high=is_clipped_C & (advantage_C > 0),
    )


def _constant_ratio(ratio_C: Tensor, logp_C: Tensor, terms: KeptTerms, numbers: LossNumbers) -> Surrogate:
    """clip(ρ) A logp with clip(ρ) a constant: no token loses its gradient (CISPO)."""
    clipped_ratio_C = _clipped_ratio(ratio_C, terms, numbers)
    d_logp_C = clipped_ratio_C * terms.advantage_C
    return Surrogate(d_logp_C * logp_C, d_logp_C, ratio_C < clipped_ratio_C, ratio_C > clipped_ratio_C)


def _gate(ratio_C: Tensor, logp_C: Tensor, terms: KeptTerms, numbers: LossNumbers) -> Surrogate:
    """4/τ σ(τ (ρ − 1)) A, τ by the sign of A (SAPO): the gradient fades as ρ leaves 1, and has no edge."""
    advantage_C = terms.advantage_C
    low, high = numbers.gate_temperature_low, numbers.gate_temperature_high
    temperature_C = torch.where(advantage_C > 0, torch.full_like(ratio_C, high), low)
    gate_C = (temperature_C * (ratio_C - 1)).sigmoid()
    never_C = torch.zeros_like(ratio_C, dtype=torch.bool)
    value_C = gate_C * 4 / temperature_C * advantage_C
    return Surrogate(value_C, 4 * gate_C * (1 - gate_C) * ratio_C * advantage_C, never_C, never_C)


SURROGATES: dict[str, Callable[[Tensor, Tensor, KeptTerms, LossNumbers], Surrogate]] = {
    "clip": _clip,
    "constant-ratio": _constant_ratio,
    "gate": _gate,
}


def _clipped_ratio(ratio_C: Tensor, terms: KeptTerms, numbers: LossNumbers) -> Tensor:
    if terms.ratio_low_C is None:
        return ratio_C.clamp(1 - numbers.clip_eps_low, 1 + numbers.clip_eps_high)
    return ratio_C.clamp(terms.ratio_low_C, terms.ratio_high_C)


@dataclass(frozen=True)
class _Sequences:
    """S runs of adjacent tokens."""

    length_S: Tensor
    total: Callable[[Tensor], Tensor]
    """[C] values of tokens -> [S] their sums over each sequence, on all ranks that have tokens of it."""
    count_S: Tensor
    """Tokens of each that carry a policy-gradient weight, at least 1."""

    @classmethod
    def of(cls, sequence_C: Tensor, has_pg_C: Tensor, group: dist.ProcessGroup | None) -> "_Sequences":
        """has_pg_C: 1.0 or 0.0. group: ranks with tokens of the same sequences. The host waits, since S is a shape."""
        id_S, length_S = sequence_C.unique_consecutive(return_counts=True)
        total = partial(_segment_sums, length_S=length_S)
        if group is not None:
            last = id_S.amax() if len(id_S) else id_S.new_full((), -1)
            dist.all_reduce(last, op=dist.ReduceOp.MAX, group=group)
            total = partial(_sums_of_ranks, total, id_S, int(last) + 1, group)
        return cls(length_S, total, total(has_pg_C).clamp(min=1))

    def mean(self, value_C: Tensor) -> Tensor:
        """[C] for each token the mean of its sequence over the tokens that count; the values of the others are 0.

        Sums of segments, not atomic additions: two runs are bit-equal.
        """
        mean_S = self.total(value_C) / self.count_S
        return mean_S.repeat_interleave(self.length_S, output_size=len(value_C))


def _segment_sums(value_C: Tensor, length_S: Tensor) -> Tensor:
    if not len(value_C):
        return value_C.new_zeros(0)
    return torch.segment_reduce(value_C, "sum", lengths=length_S, unsafe=True)


def _sums_of_ranks(
    local_sums: Callable[[Tensor], Tensor], id_S: Tensor, count: int, group: dist.ProcessGroup, value_C: Tensor
) -> Tensor:
    """[S] sums over the tokens of all ranks; `count` sequences, which have the same ids on each."""
    total = value_C.new_zeros(count).index_copy_(0, id_S, local_sums(value_C))
    dist.all_reduce(total, group=group)
    return total[id_S]


def select_terms(terms: PolicyTerms, rows_n: Tensor, dtype: torch.dtype) -> KeptTerms:
    """The terms of the rows that carry weight. A value whose weight is 0 becomes 0, so that NaN there has no effect."""
    pg_weight_n = terms.pg_weight_N[rows_n].to(dtype)
    kl_weight_n = terms.kl_weight_N[rows_n].to(dtype)

    def where_pg(value_N: Tensor, unused: float = 0.0) -> Tensor:
        return torch.where(pg_weight_n != 0, value_N[rows_n].to(dtype), unused)

    logp_teacher_n = torch.full_like(kl_weight_n, float("nan"))
    if terms.logp_teacher_N is not None:
        logp_teacher_n = terms.logp_teacher_N[rows_n].to(dtype)
    return KeptTerms(
        logp_old_C=None if terms.logp_old_N is None else where_pg(terms.logp_old_N),
        logp_teacher_C=torch.where(kl_weight_n != 0, logp_teacher_n, 0.0),
        advantage_C=where_pg(terms.advantage_N),
        pg_weight_C=pg_weight_n,
        kl_weight_C=kl_weight_n,
        logp_rollout_C=None if terms.logp_rollout_N is None else terms.logp_rollout_N[rows_n].to(dtype),
        sequence_C=None if terms.sequence_N is None else terms.sequence_N[rows_n],
        ratio_low_C=None if terms.ratio_low_N is None else where_pg(terms.ratio_low_N, 1.0),
        ratio_high_C=None if terms.ratio_high_N is None else where_pg(terms.ratio_high_N, 1.0),
        logp_reference_C=None if terms.logp_reference_N is None else terms.logp_reference_N[rows_n].to(dtype),
        reference_weight_C=None if terms.reference_weight_N is None else terms.reference_weight_N[rows_n].to(dtype),
    )


def empty_token_losses(tokens: int, like: Tensor) -> TokenLosses:
    """Memory for the losses of `tokens` tokens, filled chunk by chunk."""
    losses = {field.name: like.new_zeros(tokens) for field in fields(TokenLosses)}
    clipped = {name: like.new_zeros(tokens, dtype=torch.bool) for name in ("clipped_low", "clipped_high")}
    return TokenLosses(**(losses | clipped))
