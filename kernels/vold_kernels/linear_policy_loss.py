"""Clipped policy gradient plus k2 distillation on sampled tokens, from hidden states to gradients in one pass.

Why: dL/dlogp of a token depends on that token's own log-prob alone (advantages, old and teacher log-probs are known
before, the normaliser is a factor of the weights). So logits -> statistics -> coefficient -> dlogits -> dH, dW happen
while one chunk is resident: 6NDV, no recomputation, no [N, V] tensor. The gain is memory, fp32 precision and dropped
rows; the head is a small share of a training step.

    L = Σ w_pg · pg_weight · L_pg + w_kl · kl_weight · ½ (logp − logp_teacher)² + w_kl · reference_weight · L_ref
    L_pg = −min(ρ A, clip(ρ, 1 − clip_eps_low, 1 + clip_eps_high) A),   ρ = exp(logp − logp_old)
    dL_pg/dlogp = −ρ A where the unclipped branch is the minimum, else 0;   dL_kl/dlogp = logp − logp_teacher
    L_ref = exp(x) − 1 − x,   x = logp_reference − logp   (k3);   dL_ref/dlogp = 1 − exp(x)
    w_pg = min(exp(logp_old − logp_rollout), importance_cap), w_kl with logp in place of logp_old: importance weights,
    constants to the gradient; 1 without logp_rollout

VOLD, GRPO, DAPO, Dr.GRPO, KDRL, OPD and SRPO's sampled part are choices of the two weights (Eqs. 5 and 6 of VOLD).
Deviation from the paper: the ratio is per token, as in GRPO. Four options go beyond that:

    terms.sequence_N      ρ = exp(mean of logp − logp_old over the sequence), the same for all its tokens (GSPO). Tokens
                          then depend on each other: where one chunk holds all kept tokens the cost is the same,
                          otherwise the logits are computed twice (8NDV). The budget holds either way.
    terms.ratio_low_N, terms.ratio_high_N   bounds of each token's ratio (DCPO)
    entropy_bonus         L −= entropy_bonus · Σ pg_weight · entropy
    surrogate             L_pg = −clip(ρ) A logp with clip(ρ) a constant to the gradient ("constant-ratio": CISPO), or
                          −4/τ σ(τ (ρ − 1)) A ("gate": SAPO), instead of PPO's "clip"

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, D hidden, V vocabulary, U = this rank's
rows. The formulas are in `token_loss.py`, the kernels in `rows_triton.py`, the specification in `reference.py`.
"""

from dataclasses import dataclass, fields

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
from .one_pass import Coefficients, Rows, one_pass, two_passes
from .operators import (
    budget_from_numbers,
    budget_numbers,
    fake_outputs,
    gradient_outputs,
    gradient_shapes,
    register_backward,
)
from .softmax import SoftmaxStatistics
from .token_loss import LossNumbers, TokenLosses, empty_token_losses, select_terms, token_losses
from .types import PolicyLoss, PolicyTerms
from .vocab import VocabShard, group_from_name, group_name, vocab_shard

_Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of `PolicyLoss`."""


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    temperature: float
    budget: ChunkBudget
    loss: LossNumbers
    request: GradientRequest
    sequence_group: dist.ProcessGroup | None = None


def _one_pass(
    hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, terms: PolicyTerms, options: _Options
) -> tuple[Tensor, TokenLosses, HeadGradients]:
    """(rows that carry weight, their losses, gradients)."""
    head = Head(weight_UD, options.shard, options.temperature, options.budget)
    # n is a shape, so the host waits here, once a step; `widest_shard` (tp > 1) then waits for nothing more.
    # Chunks are those of the widest shard, so that all ranks step through the same ones.
    kept_N = (terms.pg_weight_N != 0) | (terms.kl_weight_N != 0)
    if terms.reference_weight_N is not None:
        kept_N = kept_N | (terms.reference_weight_N != 0)
    rows_n = kept_N.nonzero()[:, 0]
    tokens = head.resident_tokens(head.shard.widest_shard(), len(rows_n))
    weighted_terms = select_terms(terms, rows_n, head.dtype)
    gradients = HeadGradients(head, len(rows_n), options.request)
    per_token = empty_token_losses(len(rows_n), weighted_terms.pg_weight_C)

    def loss(kept: slice, statistics: SoftmaxStatistics) -> Coefficients:
        chunk_terms = weighted_terms.select(kept)
        losses = token_losses(statistics, chunk_terms, options.loss, options.sequence_group)
        for name, value in vars(losses).items():
            getattr(per_token, name)[kept] = value
        d_entropy_C = -options.loss.entropy_bonus * chunk_terms.pg_weight_C if options.request.entropy else None
        return losses.d_logp, d_entropy_C

    couples_ranks = terms.sequence_N is not None and options.sequence_group is not None
    if couples_ranks and not len(rows_n):  # the others wait for this rank's sums
        loss(slice(0, 0), SoftmaxStatistics(*(per_token.logp for _ in fields(SoftmaxStatistics))))
    couples_chunks = couples_ranks or (terms.sequence_N is not None and tokens < len(rows_n))
    walk = two_passes if couples_chunks else one_pass
    if not couples_ranks or len(rows_n):
        walk(head, Rows(hidden_ND, target_N, rows_n, tokens), gradients, loss)
    return rows_n, per_token, gradients


def _results(rows_n: Tensor, per_token: TokenLosses, gradients: HeadGradients, tokens: int) -> _Fields:
    """The fields of `PolicyLoss`. `gradients.finish` comes first."""
    pg_loss, kl_loss, reference_loss = (
        x.sum() for x in (per_token.pg_loss, per_token.kl_loss, per_token.reference_loss)
    )
    return (
        pg_loss + kl_loss - per_token.bonus.sum() + reference_loss,
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.logp),
        per_token.logp.new_zeros(tokens).index_copy_(0, rows_n, per_token.entropy),
        pg_loss,
        kl_loss,
        per_token.clipped_low.sum(),
        per_token.clipped_high.sum(),
        per_token.kl_old.sum(),
        gradients.dropped_mass,
        reference_loss,
    )


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
    # once_differentiable's type hides the name of its first parameter.
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
    logp_reference_N: Tensor | None,
    reference_weight_N: Tensor | None,
    needs_grad: list[bool],
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
    surrogate: str,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        logp_reference_N=logp_reference_N,
        reference_weight_N=reference_weight_N,
    )
    temperature, filter_eps, *loss_numbers = numbers
    loss = LossNumbers(*loss_numbers, surrogate=surrogate)
    shard = vocab_shard(weight_UD, vocab_size, group_from_name(group))
    request = GradientRequest(needs_grad[0], needs_grad[1], filter_eps=filter_eps, entropy=loss.entropy_bonus != 0)
    options = _Options(shard, temperature, budget_from_numbers(budget), loss, request)
    rows_n, per_token, gradients = _one_pass(hidden_ND, weight_UD, target_N, terms, options)
    d_head = gradient_outputs(rows_n, gradients, len(hidden_ND))
    return *_results(rows_n, per_token, gradients, len(hidden_ND)), *d_head


@_policy_loss_op.register_fake
def _(hidden_ND, weight_UD, target_N, _old, _teacher, _advantage, _pg, _kl, _rollout, _seq, _low, _high, *others):
    _reference, _reference_weight, needs_grad, *_ = others
    scalar, per_token = (), target_N.shape
    shapes = scalar, per_token, per_token, scalar, scalar, scalar, scalar, scalar
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
    surrogate: str = "clip",
    gate_temperatures: tuple[float, float] = (1.05, 1.0),
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    budget: ChunkBudget | None = None,
    weight_main_grad: Tensor | None = None,
    filter_eps: float = 0.0,
    sequence_group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """Clipped policy loss plus k2 distillation, with its gradients formed in the same pass: formulas at the top of this
    file.

    hidden_ND [N, D], weight_VD [V, D], target_N [N], temperature, tp_group, vocab_size: as for `linear_logprob`.
    terms: see `PolicyTerms`. Rows whose weights are all 0 are dropped before the first matmul: whatever they hold,
        NaN included, changes nothing, their gradient is exactly zero and they cost nothing.
    clip_eps_low, clip_eps_high: the ratio is clipped to [1 − clip_eps_low, 1 + clip_eps_high], unless `terms` holds
        bounds per token.
    importance_cap: the largest importance weight from terms.logp_rollout_N (truncated importance sampling).
    entropy_bonus: reward per nat of entropy, times pg_weight. On a CPU its gradient prevents reuse of tiles in cache.
    kl_clamp > 0, nats: beyond it ½ (logp − logp_teacher)² continues linearly (Huber), so that the gradient of a token
        is at most kl_weight · kl_clamp.
    surrogate: "clip" (PPO), "constant-ratio" (CISPO, arXiv 2506.13585) or "gate" (SAPO, arXiv 2511.20347). Counts of
        clipped tokens are then those of ratios outside the bounds (constant-ratio), or 0 (gate).
    gate_temperatures > 0: τ of the gate for A ≤ 0 and for A > 0.
    weight_main_grad [V, D], fp32 (fp64 for fp64): dW is added to it in place, straight from the matmul, and autograd
        gets no gradient for the weight: see "Into Megatron's main_grad" in README.md. The forward pass writes it, so
        the loss must be backpropagated with factor 1 (asserted in backward, without waiting for the host): scale
        the two weights instead. Ignored where the weight does not require grad.
    filter_eps in [0, 1): 0 is exact. Else dH and dW of a chunk leave out vocabulary columns that together hold at most
        filter_eps of the chunk's Σ|dL/dlogit|. `dropped_mass` of the result is what was left out in all, and bounds the
        error: ‖ΔdH‖ ≤ dropped_mass · max‖weight row‖, ‖ΔdW‖ ≤ dropped_mass · max‖hidden row‖. The host waits once per
        chunk. With tp_group each rank filters its own columns.
    sequence_group: the ranks that have other tokens of the same sequences, which terms.sequence_N numbers alike on all
        of them; all of them call. Ratios are then those of whole sequences (8NDV). Ignored without terms.sequence_N.
    Returns `PolicyLoss`. With terms.logp_old_N None the ratio is exactly 1; with a logp_old from `linear_logprob` of
    the same weights it is 1 within the matmul's rounding.
    Gradients are accumulated in fp32 (fp64 for fp64) and returned in the inputs' dtype, rounded once after the
    upstream factor. A side that requires no grad costs no matmul; under `torch.no_grad` neither does.
    Inside torch.compile the call is one opaque operator, with the same bits; weight_main_grad and sequence_group are
    refused there.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_target(target_N, hidden_ND)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    numbers = (clip_eps_low, clip_eps_high, importance_cap, entropy_bonus, kl_clamp, *gate_temperatures)
    loss = LossNumbers(*numbers, surrogate)
    check_policy_terms(terms, loss, len(hidden_ND))
    check_main_grad(weight_main_grad, weight_VD)
    check_filter(filter_eps)
    budget = budget or default_budget(hidden_ND.device)
    check_budget(budget, hidden_ND)
    needs_grad = [needs_gradient(hidden_ND), needs_gradient(weight_VD)]
    if torch.compiler.is_compiling():
        if sequence_group is not None:
            raise ValueError("sequence_group is not supported inside torch.compile; call the loss outside of it")
        numbers = [float(x) for x in (temperature, filter_eps, *numbers)]
        constants = (needs_grad, vocab_size, group_name(tp_group), budget_numbers(budget), surrogate, numbers)
        return PolicyLoss(*_policy_loss_op(hidden_ND, weight_VD, target_N, *vars(terms).values(), *constants)[:-2])
    shard = vocab_shard(weight_VD, vocab_size, tp_group)
    request = GradientRequest(
        needs_grad[0], needs_grad[1], main_grad_UD=weight_main_grad, filter_eps=filter_eps, entropy=entropy_bonus != 0
    )
    options = _Options(shard, temperature, budget, loss, request, sequence_group)
    return PolicyLoss(*_LinearPolicyLoss.apply(hidden_ND, weight_VD, target_N, terms, options))
