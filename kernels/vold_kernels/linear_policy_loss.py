"""Clipped policy gradient plus k2 distillation on sampled tokens, from hidden states to gradients in one pass.

Why: dL/dlogp of a token depends on that token's own log-prob alone (advantages, old and teacher log-probs are known
before, the normaliser is a factor of the weights). So logits -> statistics -> coefficient -> dlogits -> dH, dW happen
while one chunk is resident: 6NDV, no recomputation, no [N, V] tensor. The gain is memory, fp32 precision and dropped
rows; the head is a small share of a training step.

    L = Σ w_pg · pg_weight · L_pg + w_kl · kl_weight · ½ (logp − logp_teacher)²
    L_pg = −min(ρ A, clip(ρ, 1 − clip_eps_low, 1 + clip_eps_high) A),   ρ = exp(logp − logp_old)
    dL_pg/dlogp = −ρ A where the unclipped branch is the minimum, else 0;   dL_kl/dlogp = logp − logp_teacher
    w_pg = min(exp(logp_old − logp_rollout), importance_cap), w_kl with logp in place of logp_old: importance weights,
    constants to the gradient; 1 without logp_rollout

VOLD, GRPO, DAPO, Dr.GRPO, KDRL, OPD and SRPO's sampled part are choices of the two weights (Eqs. 5 and 6 of VOLD).
Deviation from the paper: the ratio is per token, as in GRPO. Three options go beyond that:

    terms.sequence_N      ρ = exp(mean of logp − logp_old over the sequence), the same for all its tokens (GSPO). Tokens
                          then depend on each other: where one chunk holds all kept tokens the cost is the same,
                          otherwise the logits are computed twice (8NDV). The budget holds either way.
    terms.ratio_low_N, terms.ratio_high_N   bounds of each token's ratio (DCPO)
    entropy_bonus         L −= entropy_bonus · Σ pg_weight · entropy

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, S sequences, D hidden, V vocabulary, U = this rank's
rows. The kernels are in `rows_triton.py`, the specification in `reference.py`.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    check_budget,
    check_filter,
    check_head,
    check_main_grad,
    check_policy_terms,
    check_target,
    check_vocab_size,
)
from .chunks import ChunkBudget, default_budget
from .head import GradientRequest, Head, HeadGradients, OnePassBackward, needs_gradient
from .one_pass import one_pass, two_passes
from .operators import (
    budget_from_numbers,
    budget_numbers,
    fake_outputs,
    gradient_outputs,
    gradient_shapes,
    register_backward,
)
from .softmax import SoftmaxStatistics
from .types import PolicyLoss, PolicyTerms
from .vocab import VocabShard, group_from_name, group_name, vocab_shard

_Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of `PolicyLoss`."""


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    temperature: float
    budget: ChunkBudget
    clip_eps_low: float
    clip_eps_high: float
    importance_cap: float
    entropy_bonus: float
    kl_clamp: float
    request: GradientRequest


@dataclass(frozen=True)
class _KeptTerms:
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

    def select(self, chunk: slice) -> "_KeptTerms":
        """The terms of some tokens."""
        return replace(self, **{name: value[chunk] for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class _PerToken:
    """[n] each, of the tokens that carry weight."""

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


def per_token_loss(statistics: SoftmaxStatistics, terms: _KeptTerms, options: _Options) -> _PerToken:
    """The loss of each token and its derivative with respect to its log-prob. With sequence_C: of all kept tokens."""
    logp_C = statistics.logp_C
    pg_weight_C, kl_weight_C, advantage_C = terms.pg_weight_C, terms.kl_weight_C, terms.advantage_C
    has_pg_C = pg_weight_C != 0
    if terms.logp_rollout_C is not None:
        logp_old_C = logp_C if terms.logp_old_C is None else terms.logp_old_C
        pg_weight_C = pg_weight_C * _importance_weight(logp_old_C, terms.logp_rollout_C, options)
        kl_weight_C = kl_weight_C * _importance_weight(logp_C, terms.logp_rollout_C, options)
    log_ratio_C = torch.zeros_like(logp_C) if terms.logp_old_C is None else logp_C - terms.logp_old_C
    log_ratio_C = torch.where(has_pg_C, log_ratio_C, 0.0)
    sequences = None if terms.sequence_C is None else _Sequences.of(terms.sequence_C, has_pg_C.to(logp_C))
    if sequences is not None:
        log_ratio_C = sequences.mean(log_ratio_C)
    ratio_C = log_ratio_C.exp()
    unclipped_C = ratio_C * advantage_C
    clipped_C = _clipped_ratio(ratio_C, terms, options) * advantage_C
    is_clipped_C = clipped_C < unclipped_C
    d_pg_C = torch.where(is_clipped_C, 0.0, -pg_weight_C * unclipped_C)
    if sequences is not None:  # every token's log-prob is in the ratio of all tokens of its sequence
        d_pg_C = torch.where(has_pg_C, sequences.mean(d_pg_C), 0.0)
    gap_C = torch.where(terms.kl_weight_C != 0, logp_C - terms.logp_teacher_C, 0.0)
    clamped_gap_C = gap_C.clamp(-options.kl_clamp, options.kl_clamp)
    return _PerToken(
        logp=logp_C,
        entropy=statistics.entropy_C,
        pg_loss=-pg_weight_C * torch.minimum(unclipped_C, clipped_C),
        kl_loss=kl_weight_C * clamped_gap_C * (gap_C - clamped_gap_C / 2),
        bonus=options.entropy_bonus * terms.pg_weight_C * statistics.entropy_C,
        d_logp=kl_weight_C * clamped_gap_C + d_pg_C,
        clipped_low=is_clipped_C & has_pg_C & (advantage_C < 0),
        clipped_high=is_clipped_C & has_pg_C & (advantage_C > 0),
        kl_old=torch.where(has_pg_C, -log_ratio_C, 0.0),
    )


def _importance_weight(logp_C: Tensor, logp_rollout_C: Tensor, options: _Options) -> Tensor:
    """Truncated importance sampling: min(exp(logp − logp_rollout), importance_cap)."""
    return (logp_C - logp_rollout_C).exp().clamp(max=options.importance_cap)


def _clipped_ratio(ratio_C: Tensor, terms: _KeptTerms, options: _Options) -> Tensor:
    if terms.ratio_low_C is None:
        return ratio_C.clamp(1 - options.clip_eps_low, 1 + options.clip_eps_high)
    return ratio_C.clamp(terms.ratio_low_C, terms.ratio_high_C)


@dataclass(frozen=True)
class _Sequences:
    """S runs of adjacent tokens."""

    length_S: Tensor
    count_S: Tensor
    """Tokens of each that carry a policy-gradient weight, at least 1."""

    @classmethod
    def of(cls, sequence_C: Tensor, has_pg_C: Tensor) -> "_Sequences":
        """has_pg_C: 1.0 or 0.0. The host waits, since S is a shape."""
        _, length_S = sequence_C.unique_consecutive(return_counts=True)
        return cls(length_S, torch.segment_reduce(has_pg_C, "sum", lengths=length_S, unsafe=True).clamp(min=1))

    def mean(self, value_C: Tensor) -> Tensor:
        """[C] for each token the mean of its sequence over the tokens that count; the values of the others are 0.

        Sums of segments, not atomic additions: two runs are bit-equal.
        """
        total_S = torch.segment_reduce(value_C, "sum", lengths=self.length_S, unsafe=True)
        return (total_S / self.count_S).repeat_interleave(self.length_S, output_size=len(value_C))


def _kept_terms(terms: PolicyTerms, rows_n: Tensor, dtype: torch.dtype) -> _KeptTerms:
    """The terms of the rows that carry weight. A value whose weight is 0 becomes 0, so that NaN there has no effect."""
    pg_weight_n = terms.pg_weight_N[rows_n].to(dtype)
    kl_weight_n = terms.kl_weight_N[rows_n].to(dtype)

    def where_pg(value_N: Tensor, unused: float = 0.0) -> Tensor:
        return torch.where(pg_weight_n != 0, value_N[rows_n].to(dtype), unused)

    logp_teacher_n = torch.full_like(kl_weight_n, float("nan"))
    if terms.logp_teacher_N is not None:
        logp_teacher_n = terms.logp_teacher_N[rows_n].to(dtype)
    return _KeptTerms(
        logp_old_C=None if terms.logp_old_N is None else where_pg(terms.logp_old_N),
        logp_teacher_C=torch.where(kl_weight_n != 0, logp_teacher_n, 0.0),
        advantage_C=where_pg(terms.advantage_N),
        pg_weight_C=pg_weight_n,
        kl_weight_C=kl_weight_n,
        logp_rollout_C=None if terms.logp_rollout_N is None else terms.logp_rollout_N[rows_n].to(dtype),
        sequence_C=None if terms.sequence_N is None else terms.sequence_N[rows_n],
        ratio_low_C=None if terms.ratio_low_N is None else where_pg(terms.ratio_low_N, 1.0),
        ratio_high_C=None if terms.ratio_high_N is None else where_pg(terms.ratio_high_N, 1.0),
    )


def _one_pass(
    hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, terms: PolicyTerms, options: _Options
) -> tuple[Tensor, _PerToken, HeadGradients]:
    """(rows that carry weight, their losses, gradients)."""
    head = Head(weight_UD, options.shard, options.temperature, options.budget)
    # n is a shape, so the host waits here, once a step; `widest_shard` (tp > 1) then waits for nothing more.
    # Chunks are those of the widest shard, so that all ranks step through the same ones.
    rows_n = ((terms.pg_weight_N != 0) | (terms.kl_weight_N != 0)).nonzero()[:, 0]
    tokens = head.resident_tokens(head.shard.widest_shard(), len(rows_n))
    kept_terms = _kept_terms(terms, rows_n, head.dtype)
    gradients = HeadGradients(head, len(rows_n), options.request)
    per_token = _empty_per_token(len(rows_n), kept_terms.pg_weight_C)
    couples_chunks = terms.sequence_N is not None and tokens < len(rows_n)
    walk = two_passes if couples_chunks else one_pass
    for kept, statistics, add_gradient in walk(head, hidden_ND, target_N, rows_n, gradients, tokens=tokens):
        chunk_terms = kept_terms.select(kept)
        losses = per_token_loss(statistics, chunk_terms, options)
        d_entropy = [-options.entropy_bonus * chunk_terms.pg_weight_C] if options.request.entropy else []
        add_gradient(losses.d_logp, *d_entropy)
        for name, value in vars(losses).items():
            getattr(per_token, name)[kept] = value
    return rows_n, per_token, gradients


def _results(rows_n: Tensor, per_token: _PerToken, gradients: HeadGradients, tokens: int) -> _Fields:
    """The fields of `PolicyLoss`. `gradients.finish` comes first."""
    pg_loss, kl_loss = per_token.pg_loss.sum(), per_token.kl_loss.sum()
    return (
        pg_loss + kl_loss - per_token.bonus.sum(),
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.logp),
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.entropy),
        pg_loss,
        kl_loss,
        per_token.clipped_low.sum(),
        per_token.clipped_high.sum(),
        per_token.kl_old.sum(),
        gradients.dropped_mass,
    )


def _empty_per_token(tokens: int, like: Tensor) -> _PerToken:
    fields = {name: like.new_zeros(tokens) for name in _PerToken.__dataclass_fields__}
    clipped = {name: like.new_zeros(tokens, dtype=torch.bool) for name in ("clipped_low", "clipped_high")}
    return _PerToken(**(fields | clipped))


class _LinearPolicyLoss(torch.autograd.Function):
    """Forward forms the gradients, backward multiplies them by the upstream factor."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, terms: PolicyTerms, options: _Options):
        rows_n, per_token, gradients = _one_pass(hidden_ND, weight_UD, target_N, terms, options)
        ctx.save_for_backward(rows_n, *gradients.finish())
        loss, *detached = _results(rows_n, per_token, gradients, len(hidden_ND))
        ctx.mark_non_differentiable(*detached)
        ctx.backward_of_loss = OnePassBackward(len(hidden_ND), hidden_ND.dtype, options.request)
        return loss, *detached

    @staticmethod
    @once_differentiable
    # once_differentiable\'s type hides the name of its first parameter.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.backward_of_loss(ctx.saved_tensors, grad_outputs[0]), None, None, None


# The same pass as an opaque operator for torch.compile. Eager calls use the class above.


@torch.library.custom_op("vold_kernels::linear_policy_loss", mutates_args=())
def _policy_loss_op(
    hidden_ND: Tensor,
    weight_UD: Tensor,
    target_N: Tensor,
    logp_old_N: Tensor | None,
    logp_teacher_N: Tensor | None,
    advantage_N: Tensor,
    pg_weight_N: Tensor,
    kl_weight_N: Tensor,
    logp_rollout_N: Tensor | None,
    sequence_N: Tensor | None,
    ratio_low_N: Tensor | None,
    ratio_high_N: Tensor | None,
    needs_grad: list[bool],
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLoss`, then `gradient_outputs`."""
    terms = PolicyTerms(
        logp_old_N=logp_old_N,
        logp_teacher_N=logp_teacher_N,
        advantage_N=advantage_N,
        pg_weight_N=pg_weight_N,
        kl_weight_N=kl_weight_N,
        logp_rollout_N=logp_rollout_N,
        sequence_N=sequence_N,
        ratio_low_N=ratio_low_N,
        ratio_high_N=ratio_high_N,
    )
    temperature, eps_low, eps_high, importance_cap, entropy_bonus, kl_clamp, filter_eps = numbers
    shard = vocab_shard(weight_UD, vocab_size, group_from_name(group))
    request = GradientRequest(needs_grad[0], needs_grad[1], filter_eps=filter_eps, entropy=entropy_bonus != 0)
    loss_numbers = (eps_low, eps_high, importance_cap, entropy_bonus, kl_clamp)
    options = _Options(shard, temperature, budget_from_numbers(budget), *loss_numbers, request)
    rows_n, per_token, gradients = _one_pass(hidden_ND, weight_UD, target_N, terms, options)
    d_head = gradient_outputs(rows_n, gradients, len(hidden_ND))
    return *_results(rows_n, per_token, gradients, len(hidden_ND)), *d_head


@_policy_loss_op.register_fake
def _(
    hidden_ND, weight_UD, target_N, _old, _teacher, _advantage, _pg, _kl, _rollout, _seq, _low, _high, needs_grad, *_
):
    scalar, per_token = (), target_N.shape
    shapes = scalar, per_token, per_token, scalar, scalar, scalar, scalar
    loss, logp_N, entropy_N, pg_loss, kl_loss, *others = fake_outputs(
        hidden_ND, *shapes, *gradient_shapes(hidden_ND, weight_UD, needs_grad)
    )
    counts = (torch.empty_like(loss, dtype=torch.int64) for _ in range(2))
    return loss, logp_N, entropy_N, pg_loss, kl_loss, *counts, *others


register_backward(_policy_loss_op)


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
    kl_clamp: float = float("inf"),
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    budget: ChunkBudget | None = None,
    weight_main_grad: Tensor | None = None,
    filter_eps: float = 0.0,
) -> PolicyLoss:
    """Clipped policy loss plus k2 distillation, with its gradients formed in the same pass: formulas at the top of this
    file.

    hidden_ND [N, D], weight_VD [V, D], target_N [N], temperature, tp_group, vocab_size: as for `linear_logprob`.
    terms: see `PolicyTerms`. Rows whose two weights are both 0 are dropped before the first matmul: whatever they hold,
        NaN included, changes nothing, their gradient is exactly zero and they cost nothing.
    clip_eps_low, clip_eps_high: the ratio is clipped to [1 − clip_eps_low, 1 + clip_eps_high], unless `terms` holds
        bounds per token.
    importance_cap: the largest importance weight from terms.logp_rollout_N (truncated importance sampling).
    entropy_bonus: reward per nat of entropy, times pg_weight. On a CPU its gradient prevents reuse of tiles in cache.
    kl_clamp > 0, nats: beyond it ½ (logp − logp_teacher)² continues linearly (Huber), so that the gradient of a token
        is at most kl_weight · kl_clamp.
    weight_main_grad [V, D], fp32 (fp64 for fp64): dW is added to it in place, straight from the matmul, and autograd
        gets no gradient for the weight: see "Into Megatron's main_grad" in README.md. The forward pass writes it, so
        the loss must be backpropagated with factor 1 (asserted in backward, without waiting for the host): scale
        the two weights instead. Ignored where the weight does not require grad.
    filter_eps in [0, 1): 0 is exact. Else dH and dW of a chunk leave out vocabulary columns that together hold at most
        filter_eps of the chunk's Σ|dL/dlogit|. `dropped_mass` of the result is what was left out in all, and bounds the
        error: ‖ΔdH‖ ≤ dropped_mass · max‖weight row‖, ‖ΔdW‖ ≤ dropped_mass · max‖hidden row‖. The host waits once per
        chunk. With tp_group each rank filters its own columns.
    Returns `PolicyLoss`. With terms.logp_old_N None the ratio is exactly 1; with a logp_old from `linear_logprob` of
    the same weights it is 1 within the matmul's rounding.
    Gradients are accumulated in fp32 (fp64 for fp64) and returned in the inputs' dtype, rounded once after the
    upstream factor. A side that requires no grad costs no matmul; under `torch.no_grad` neither does.
    Inside torch.compile the call is one opaque operator, with the same bits; weight_main_grad is refused there.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_target(target_N, hidden_ND)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    bounds = {"clip_eps_low": clip_eps_low, "clip_eps_high": clip_eps_high}
    check_policy_terms(terms, len(hidden_ND), **bounds, importance_cap=importance_cap, kl_clamp=kl_clamp)
    check_main_grad(weight_main_grad, weight_VD)
    check_filter(filter_eps)
    budget = budget or default_budget(hidden_ND.device)
    check_budget(budget, hidden_ND)
    needs_grad = [needs_gradient(hidden_ND), needs_gradient(weight_VD)]
    loss_numbers = (clip_eps_low, clip_eps_high, importance_cap, entropy_bonus, kl_clamp)
    if torch.compiler.is_compiling():
        numbers = [float(x) for x in (temperature, *loss_numbers, filter_eps)]
        constants = (needs_grad, vocab_size, group_name(tp_group), budget_numbers(budget), numbers)
        return PolicyLoss(*_policy_loss_op(hidden_ND, weight_VD, target_N, *vars(terms).values(), *constants)[:-2])
    shard = vocab_shard(weight_VD, vocab_size, tp_group)
    request = GradientRequest(
        needs_grad[0], needs_grad[1], main_grad_UD=weight_main_grad, filter_eps=filter_eps, entropy=entropy_bonus != 0
    )
    options = _Options(shard, temperature, budget, *loss_numbers, request)
    return PolicyLoss(*_LinearPolicyLoss.apply(hidden_ND, weight_VD, target_N, terms, options))
