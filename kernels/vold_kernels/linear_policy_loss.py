"""Clipped policy gradient plus k2 distillation on sampled tokens, from hidden states to gradients in one pass.

Why: dL/dlogp of a token depends on that token's own log-prob alone (advantages, old and teacher log-probs are known
before, the normaliser sits in the weights). So logits -> statistics -> coefficient -> dlogits -> dH, dW happen while
one chunk is resident: 6NHV, no recomputation, no [N, V] tensor. What is won is memory, fp32 precision and dropped
rows; the head is a small share of a training step.

    L = Σ w_pg · pg_weight · L_pg + w_kl · kl_weight · ½ (logp − logp_teacher)²
    L_pg = −min(ρ A, clip(ρ, 1 − clip_eps_low, 1 + clip_eps_high) A),   ρ = exp(logp − logp_old)
    dL_pg/dlogp = −ρ A where the unclipped branch is the minimum, else 0;   dL_kl/dlogp = logp − logp_teacher
    w_pg = min(exp(logp_old − logp_rollout), importance_cap), w_kl with logp for logp_old, which has no ρ beside it:
    constants to the gradient; 1 without logp_rollout

VOLD, GRPO, DAPO, Dr.GRPO, KDRL, OPD and SRPO's sampled part are choices of the two weights (Eqs. 5 and 6 of VOLD).
Deviation from the paper: the ratio is per token, as in GRPO. Three things can be asked for beyond that:

    terms.sequence_N      ρ = exp(mean of logp − logp_old over the sequence), the same for all its tokens (GSPO). Tokens
                          then depend on each other: they share a chunk where it holds them all, and otherwise the
                          logits are made twice (8NHV). Never more of them at once than the budget says.
    terms.ratio_low_N, _high_N   bounds of the ratio token by token (DCPO)
    entropy_bonus         L −= entropy_bonus · Σ pg_weight · entropy

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, D hidden, V vocabulary, U = this rank's rows.
The kernels are in `rows_triton.py`, the specification in `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    check_budget,
    check_filter,
    check_head,
    check_main_grad,
    check_policy,
    check_target,
    check_vocab_size,
)
from .chunks import ChunkBudget, default_budget
from .head import GradientRequest, Head, HeadGradients, OnePass
from .one_pass import one_pass, two_passes
from .operators import fake, gradient_outputs, gradient_shapes, register_backward
from .rows import Statistics
from .types import PolicyLoss, PolicyTerms
from .vocab import VocabShard, group_name, group_named, vocab_shard

__all__ = ["PolicyLoss", "PolicyTerms", "linear_policy_loss"]


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
    wanted: GradientRequest


@dataclass(frozen=True)
class _PerToken:
    """[n] each, of the tokens that carry weight."""

    logp: Tensor
    entropy: Tensor
    pg_loss: Tensor
    kl_loss: Tensor
    bonus: Tensor
    d_logp: Tensor
    clip_count_low: Tensor
    clip_count_high: Tensor
    kl_old: Tensor


def surrogate(statistics: Statistics, terms: PolicyTerms, options: _Options) -> _PerToken:
    """The loss of each token and its derivative with respect to its log-prob. `terms` as `_kept_terms` leaves them, and
    with sequence_N all of them."""
    logp_C = statistics.logp_C
    pg_weight_C, kl_weight_C, advantage_C = terms.pg_weight_N, terms.kl_weight_N, terms.advantage_N
    has_pg_C = pg_weight_C != 0
    if terms.logp_rollout_N is not None:
        before_C = logp_C if terms.logp_old_N is None else terms.logp_old_N
        pg_weight_C = pg_weight_C * _importance(before_C, terms, options)
        kl_weight_C = kl_weight_C * _importance(logp_C, terms, options)
    log_ratio_C = torch.zeros_like(logp_C) if terms.logp_old_N is None else logp_C - terms.logp_old_N
    log_ratio_C = torch.where(has_pg_C, log_ratio_C, 0.0)
    sequences = None if terms.sequence_N is None else _Sequences.of(terms.sequence_N, has_pg_C.to(logp_C))
    if sequences is not None:
        log_ratio_C = sequences.mean(log_ratio_C)
    ratio_C = log_ratio_C.exp()
    unclipped_C = ratio_C * advantage_C
    clipped_C = _within_bounds(ratio_C, terms, options) * advantage_C
    is_clipped_C = clipped_C < unclipped_C
    d_pg_C = torch.where(is_clipped_C, 0.0, -pg_weight_C * unclipped_C)
    if sequences is not None:  # of every term of the sequence, as each has all its tokens in its ratio
        d_pg_C = torch.where(has_pg_C, sequences.mean(d_pg_C), 0.0)
    gap_C = torch.where(terms.kl_weight_N != 0, logp_C - terms.logp_teacher_N, 0.0)
    pull_C = gap_C.clamp(-options.kl_clamp, options.kl_clamp)
    return _PerToken(
        logp=logp_C,
        entropy=statistics.entropy_C,
        pg_loss=-pg_weight_C * torch.minimum(unclipped_C, clipped_C),
        kl_loss=kl_weight_C * pull_C * (gap_C - pull_C / 2),
        bonus=options.entropy_bonus * terms.pg_weight_N * statistics.entropy_C,
        d_logp=kl_weight_C * pull_C + d_pg_C,
        clip_count_low=is_clipped_C & has_pg_C & (advantage_C < 0),
        clip_count_high=is_clipped_C & has_pg_C & (advantage_C > 0),
        kl_old=torch.where(has_pg_C, -log_ratio_C, 0.0),
    )


def _importance(logp_C: Tensor, terms: PolicyTerms, options: _Options) -> Tensor:
    return (logp_C - terms.logp_rollout_N).exp().clamp(max=options.importance_cap)


def _within_bounds(ratio_C: Tensor, terms: PolicyTerms, options: _Options) -> Tensor:
    if terms.ratio_low_N is None:
        return ratio_C.clamp(1 - options.clip_eps_low, 1 + options.clip_eps_high)
    return ratio_C.clamp(terms.ratio_low_N, terms.ratio_high_N)


@dataclass(frozen=True)
class _Sequences:
    """S runs of adjacent tokens, and how many tokens of each count."""

    length_S: Tensor
    count_S: Tensor

    @classmethod
    def of(cls, sequence_C: Tensor, counts_C: Tensor) -> "_Sequences":
        """counts_C: 1 or 0. The host waits: S is a shape."""
        _, length_S = sequence_C.unique_consecutive(return_counts=True)
        return cls(length_S, torch.segment_reduce(counts_C, "sum", lengths=length_S, unsafe=True).clamp(min=1))

    def mean(self, value_C: Tensor) -> Tensor:
        """Of each token, the mean of its sequence over the tokens that count; the others' values are 0. Sums of
        segments, not atomic additions: two runs are bit-equal."""
        total_S = torch.segment_reduce(value_C, "sum", lengths=self.length_S, unsafe=True)
        return (total_S / self.count_S).repeat_interleave(self.length_S, output_size=len(value_C))


def _kept_terms(terms: PolicyTerms, rows_n: Tensor, dtype: torch.dtype) -> PolicyTerms:
    """The rows that carry weight, with 0 wherever a field's own weight is 0: what is not used cannot leak."""
    pg_weight_n = terms.pg_weight_N[rows_n].to(dtype)
    kl_weight_n = terms.kl_weight_N[rows_n].to(dtype)
    missing_n = torch.full_like(kl_weight_n, float("nan"))
    logp_teacher_n = missing_n if terms.logp_teacher_N is None else terms.logp_teacher_N[rows_n].to(dtype)

    def of_pg(value_N: Tensor | None, unused: float = 0.0) -> Tensor | None:
        return None if value_N is None else torch.where(pg_weight_n != 0, value_N[rows_n].to(dtype), unused)

    return PolicyTerms(
        logp_old_N=of_pg(terms.logp_old_N),
        logp_teacher_N=torch.where(kl_weight_n != 0, logp_teacher_n, 0.0),
        advantage_N=of_pg(terms.advantage_N),
        pg_weight_N=pg_weight_n,
        kl_weight_N=kl_weight_n,
        logp_rollout_N=None if terms.logp_rollout_N is None else terms.logp_rollout_N[rows_n].to(dtype),
        sequence_N=None if terms.sequence_N is None else terms.sequence_N[rows_n],
        ratio_low_N=of_pg(terms.ratio_low_N, 1.0),
        ratio_high_N=of_pg(terms.ratio_high_N, 1.0),
    )


def _chunk_of(terms: PolicyTerms, chunk: slice) -> PolicyTerms:
    return PolicyTerms(*(None if value is None else value[chunk] for value in vars(terms).values()))


def _one_pass(
    hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, terms: PolicyTerms, options: _Options
) -> tuple[Tensor, _PerToken, HeadGradients]:
    head = Head(weight_UD, options.shard, options.temperature, options.budget)
    # How many rows are left is a shape, so the host waits here, once a step; `widest` (tp > 1) waits for nothing more.
    # Chunks are those of the widest shard, so that all ranks meet at the same ones.
    rows_n = ((terms.pg_weight_N != 0) | (terms.kl_weight_N != 0)).nonzero()[:, 0]
    tokens = head.resident_tokens(head.shard.widest(), len(rows_n))
    terms = _kept_terms(terms, rows_n, head.dtype)
    gradients = HeadGradients(head, len(rows_n), options.wanted)
    per_token = _empty_per_token(len(rows_n), terms.pg_weight_N)
    couples_chunks = terms.sequence_N is not None and tokens < len(rows_n)
    chunks = two_passes if couples_chunks else one_pass
    for where, statistics, add_gradient in chunks(head, hidden_ND, target_N, rows_n, gradients, tokens=tokens):
        chunk = _chunk_of(terms, where)
        result = surrogate(statistics, chunk, options)
        add_gradient(result.d_logp, *([-options.entropy_bonus * chunk.pg_weight_N] if options.wanted.entropy else []))
        for name, value in vars(result).items():
            getattr(per_token, name)[where] = value
    return rows_n, per_token, gradients


def _results(rows_n: Tensor, per_token: _PerToken, gradients: HeadGradients, tokens: int) -> tuple[Tensor, ...]:
    """The fields of `PolicyLoss`. The gradients must be finished."""
    pg_loss, kl_loss = per_token.pg_loss.sum(), per_token.kl_loss.sum()
    return (
        pg_loss + kl_loss - per_token.bonus.sum(),
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.logp),
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.entropy),
        pg_loss,
        kl_loss,
        per_token.clip_count_low.sum(),
        per_token.clip_count_high.sum(),
        per_token.kl_old.sum(),
        gradients.dropped_mass,
    )


def _empty_per_token(tokens: int, like: Tensor) -> _PerToken:
    fields = {name: like.new_zeros(tokens) for name in _PerToken.__dataclass_fields__}
    counts = {name: like.new_zeros(tokens, dtype=torch.bool) for name in ("clip_count_low", "clip_count_high")}
    return _PerToken(**(fields | counts))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, terms: PolicyTerms, options: _Options):
        rows_n, per_token, gradients = _one_pass(hidden_ND, weight_UD, target_N, terms, options)
        ctx.save_for_backward(rows_n, *gradients.finish())
        loss, *detached = _results(rows_n, per_token, gradients, len(hidden_ND))
        ctx.mark_non_differentiable(*detached)
        ctx.one_pass = OnePass(len(hidden_ND), hidden_ND.dtype, options.wanted)
        return loss, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, *_):
        """The gradients exist already; only the upstream factor is missing. (Masks and 1/Z belong in the weights.)"""
        return *ctx.one_pass.backward(ctx.saved_tensors, d_loss), None, None, None


# The same pass as an operator that torch.compile holds without looking inside. Eager calls take the class above.


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
    wanted: list[bool],
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLoss`, dH [N, D] and dW as accumulated; a side that is not wanted has no elements."""
    each = (logp_old_N, logp_teacher_N, advantage_N, pg_weight_N, kl_weight_N, logp_rollout_N)
    terms = PolicyTerms(*each, sequence_N, ratio_low_N, ratio_high_N)
    shard = vocab_shard(weight_UD, vocab_size, group_named(group))
    temperature, *loss, filter_eps = numbers
    wants = GradientRequest(*wanted, filter_eps=filter_eps, entropy=loss[3] != 0)
    options = _Options(shard, temperature, ChunkBudget(*budget), *loss, wants)
    rows_n, per_token, gradients = _one_pass(hidden_ND, weight_UD, target_N, terms, options)
    d_head = gradient_outputs(rows_n, gradients, len(hidden_ND))
    return *_results(rows_n, per_token, gradients, len(hidden_ND)), *d_head


@_policy_loss_op.register_fake
def _(hidden_ND, weight_UD, target_N, _old, _teacher, _advantage, _pg, _kl, _rollout, _seq, _low, _high, wanted, *_):
    one, each, shapes = (), target_N.shape, gradient_shapes(hidden_ND, weight_UD, wanted)
    loss, logp_N, entropy_N, pg_loss, kl_loss, *rest = fake(hidden_ND, one, each, each, one, one, one, one, *shapes)
    clips = (torch.empty_like(loss, dtype=torch.int64) for _ in range(2))
    return loss, logp_N, entropy_N, pg_loss, kl_loss, *clips, *rest


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
    """The loss at the top of this file, its gradients formed on the way.

    hidden_ND [N, D], weight_VD [V, D], target_N [N], temperature, tp_group, vocab_size: as for `linear_logprob`.
    terms: see `PolicyTerms`. Rows whose two weights are both 0 are dropped before the first matmul: whatever they hold,
        NaN included, changes nothing, their gradient is exactly zero and they cost nothing.
    clip_eps_low, clip_eps_high: the ratio is clipped to [1 − clip_eps_low, 1 + clip_eps_high], unless `terms` has bounds of its own.
    importance_cap: the largest weight a token gets from terms.logp_rollout_N (truncated importance sampling).
    entropy_bonus: of a nat of entropy, where pg_weight is not 0. On a CPU its gradient costs the tiles' reuse in cache.
    kl_clamp > 0, nats: beyond it ½ (logp − logp_teacher)² goes on linearly (Huber), so that no token is pulled towards
        the teacher harder than kl_weight · kl_clamp.
    weight_main_grad [V, D], fp32 (fp64 for fp64): dW is added to it in place, straight from the matmul, and autograd
        gets no gradient for the weight: see "Into Megatron's main_grad" in README.md. The forward pass writes it, so
        the loss must be backpropagated with factor 1 (asserted in backward, without waiting for the host): scale
        the two weights instead. Read only where the weight requires grad.
    filter_eps in [0, 1): 0 is exact. Else dH and dW of a chunk are restricted to the vocabulary columns that matter;
        the others hold at most filter_eps of the chunk's Σ|dL/dlogit| together. `dropped_mass` of the result says how
        much that was in all, and bounds the error: ‖ΔdH‖ ≤ dropped_mass · max‖weight row‖, ‖ΔdW‖ ≤ dropped_mass ·
        max‖hidden row‖. The host waits once a chunk. With tp_group each rank filters its own columns.
    Returns `PolicyLoss`. With terms.logp_old_N None the ratio is exactly 1; with a logp_old from `linear_logprob` of
    the same weights it is 1 within the matmul's rounding.
    Gradients are accumulated in fp32 (fp64 for fp64) and returned in the inputs' dtype, rounded once after the
    upstream factor. A side that requires no grad costs no matmul; under `torch.no_grad` none does.
    Inside torch.compile the call is one opaque operator, with the same bits; weight_main_grad has no place there.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_target(target_N, hidden_ND)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    bounds = {"clip_eps_low": clip_eps_low, "clip_eps_high": clip_eps_high}
    check_policy(terms, len(hidden_ND), **bounds, importance_cap=importance_cap, kl_clamp=kl_clamp)
    check_main_grad(weight_main_grad, weight_VD)
    check_filter(filter_eps)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_VD)]
    budget = budget or default_budget(hidden_ND.device)
    check_budget(budget, hidden_ND)
    loss = (clip_eps_low, clip_eps_high, importance_cap, entropy_bonus, kl_clamp)
    if torch.compiler.is_compiling():
        sizes = list(vars(budget).values())
        numbers = [float(x) for x in (temperature, *loss, filter_eps)]
        constants = (wanted, vocab_size, group_name(tp_group), sizes, numbers)
        fields = _policy_loss_op(hidden_ND, weight_VD, target_N, *vars(terms).values(), *constants)[:-2]
        return PolicyLoss(*fields)
    shard = vocab_shard(weight_VD, vocab_size, tp_group)
    wanted = GradientRequest(*wanted, weight_main_grad, filter_eps, entropy=entropy_bonus != 0)
    options = _Options(shard, temperature, budget, *loss, wanted)
    return PolicyLoss(*_LinearPolicyLoss.apply(hidden_ND, weight_VD, target_N, terms, options))
