"""Log-probability (and entropy) of given tokens under a language-model head, without the [N, V] logits.

Why: the log-probs of given tokens under the teacher and the old policy need no [N, V] matrix; at V = 151936 the fp32
logits of 32k tokens are 20 GB. Here the matmul writes one fp32 tile, a row kernel folds it into the softmax statistics
of each token, and the tile is used again. The differentiable form is for losses that couple tokens: its backward
recomputes the logits (8NDV instead of 6). For a loss whose coefficient at a token depends on that token alone,
`linear_policy_loss` is cheaper.

Shape letters: N tokens, n tokens with a gradient, C tokens of a chunk, D hidden, V vocabulary, U = this rank's rows.
The kernels are in `rows_triton.py`, the specification in `reference.py`.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_budget, check_head, check_target, check_vocab_size
from .chunks import ChunkBudget, default_budget
from .head import GradientRequest, Head, HeadGradients, scaled, scatter_rows, stream_statistics
from .one_pass import Rows, second_pass
from .operators import budget_from_numbers, budget_numbers, fake_outputs
from .softmax import SoftmaxStatistics
from .vocab import VocabShard, group_from_name, group_name, vocab_shard


class _LinearLogprob(torch.autograd.Function):
    """Forward saves the softmax statistics, backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_UD: Tensor,
        target_N: Tensor,
        shard: VocabShard,
        temperature: float,
        budget: ChunkBudget,
    ):
        head = Head(weight_UD, shard, temperature, budget)
        statistics = stream_statistics(head, hidden_ND, target_N)
        ctx.save_for_backward(hidden_ND, target_N, weight_UD, *vars(statistics).values())
        ctx.constants = (shard, temperature, budget)
        ctx.set_materialize_grads(False)
        return statistics.logp_C, statistics.entropy_C

    @staticmethod
    @once_differentiable
    # once_differentiable's type hides the name of its first parameter.
    def backward(ctx, *grad_outputs: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, target_N, weight_UD, *statistics = ctx.saved_tensors
        if all(gradient is None for gradient in grad_outputs):
            return (None,) * 6
        head, request = Head(weight_UD, *ctx.constants), GradientRequest(*ctx.needs_input_grad[:2])
        saved = hidden_ND, target_N, SoftmaxStatistics(*statistics)
        return *_recompute(head, saved, grad_outputs, request), None, None, None, None


def _recompute(
    head: Head,
    saved: tuple[Tensor, Tensor, SoftmaxStatistics],
    grad_outputs: tuple[Tensor | None, ...],
    request: GradientRequest,
) -> tuple[Tensor | None, Tensor | None]:
    """(dH [N, D], dW [U, D]) from the upstream gradients of (log-prob, entropy), of which at least one is given.

    saved: (hidden_ND, target_N, statistics).
    """
    hidden_ND, target_N, statistics = saved
    d_logp_N, d_entropy_N = grad_outputs
    if d_logp_N is None:
        assert d_entropy_N is not None
        d_logp_N = torch.zeros_like(d_entropy_N)
    rows_n = _rows_with_gradient(d_logp_N, d_entropy_N)
    gradients = HeadGradients(head, len(rows_n), request)
    tokens = head.resident_tokens(head.shard.rows, len(rows_n))
    d_entropy_n = None if d_entropy_N is None else d_entropy_N[rows_n]
    rows, coefficients = Rows(hidden_ND, target_N, rows_n, tokens), (d_logp_N[rows_n], d_entropy_n)
    second_pass(head, rows, gradients, statistics.select(rows_n), coefficients)
    d_hidden_nD, d_weight_UD = gradients.finish()
    d_hidden_ND = None
    if d_hidden_nD is not None:
        d_hidden_ND = scatter_rows(rows_n, scaled(d_hidden_nD, None, hidden_ND.dtype), len(hidden_ND))
    return d_hidden_ND, None if d_weight_UD is None else scaled(d_weight_UD, None, head.weight_UD.dtype)


def _rows_with_gradient(d_logp_N: Tensor, d_entropy_N: Tensor | None) -> Tensor:
    """[n] indices of the tokens whose upstream gradient is not 0. The host waits, since n is a shape."""
    has_gradient_N = d_logp_N != 0
    if d_entropy_N is not None:
        has_gradient_N |= d_entropy_N != 0
    return has_gradient_N.nonzero()[:, 0]


# The same two passes as opaque operators for torch.compile. Eager calls use the class above.


@torch.library.custom_op("vold_kernels::linear_logprob", mutates_args=())
def _logprob_op(
    hidden_ND: Tensor,
    weight_UD: Tensor,
    target_N: Tensor,
    temperature: float,
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `SoftmaxStatistics`, [N] each."""
    shard = vocab_shard(weight_UD, vocab_size, group_from_name(group))
    head = Head(weight_UD, shard, temperature, budget_from_numbers(budget))
    statistics = stream_statistics(head, hidden_ND, target_N)
    return statistics.max_C, statistics.log_sum_C, statistics.logp_C, statistics.entropy_C


@_logprob_op.register_fake
def _(hidden_ND, weight_UD, *_):
    return fake_outputs(hidden_ND, *[hidden_ND.shape[:1]] * 4)


@torch.library.custom_op("vold_kernels::linear_logprob_backward", mutates_args=())
def _logprob_backward_op(
    saved: list[Tensor],
    d_logp_N: Tensor | None,
    d_entropy_N: Tensor | None,
    needs_grad: list[bool],
    temperature: float,
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
) -> tuple[Tensor, Tensor]:
    """(dH [N, D], dW [U, D]); a side that is not needed has no elements."""
    hidden_ND, target_N, weight_UD, *statistics = saved
    shard = vocab_shard(weight_UD, vocab_size, group_from_name(group))
    head = Head(weight_UD, shard, temperature, budget_from_numbers(budget))
    request = GradientRequest(needs_grad[0], needs_grad[1])
    inputs = hidden_ND, target_N, SoftmaxStatistics(*statistics)
    d_hidden_ND, d_weight_UD = _recompute(head, inputs, (d_logp_N, d_entropy_N), request)
    return (
        hidden_ND.new_empty(0) if d_hidden_ND is None else d_hidden_ND,
        hidden_ND.new_empty(0) if d_weight_UD is None else d_weight_UD,
    )


@_logprob_backward_op.register_fake
def _(saved, d_logp_N, d_entropy_N, needs_grad, *_):
    hidden_ND, _, weight_UD, *_ = saved
    sides = zip((hidden_ND, weight_UD), needs_grad, strict=True)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in sides)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    hidden_ND, weight_UD, target_N, *ctx.constants = inputs
    ctx.save_for_backward(hidden_ND, target_N, weight_UD, *output)
    ctx.mark_non_differentiable(*output[:2])
    ctx.set_materialize_grads(False)


def _backward(ctx, _max, _log_sum, d_logp_N: Tensor | None, d_entropy_N: Tensor | None):
    if d_logp_N is None and d_entropy_N is None:
        return (None,) * 7
    needs_grad = list(ctx.needs_input_grad[:2])
    gradients = _logprob_backward_op(list(ctx.saved_tensors), d_logp_N, d_entropy_N, needs_grad, *ctx.constants)
    gradients = (gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True))
    return *gradients, None, None, None, None, None


_logprob_op.register_autograd(_backward, setup_context=_save)


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    budget: ChunkBudget | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target token: log softmax(hidden weightᵀ / temperature) at the targets.

    hidden_ND [N, D] and weight_VD [V, D]: bf16, fp32 or fp64, the same for both; hidden may be non-contiguous.
    target_N [N]: integer ids. An id that is no real vocabulary row gives NaN (checking would wait for the host).
    tp_group: weight_VD holds this rank's consecutive rows, in rank order; shards may be unequal. hidden, target and the
        upstream gradients are the same on every rank; the hidden gradient is summed over ranks here.
    vocab_size: real rows over all ranks; rows at or beyond it are −inf and get exactly zero gradient.
    Returns log-probs [N] in nats, fp32 (fp64 for fp64), ≤ 0; with return_entropy also the entropies [N] in nats. Both
    are differentiable with respect to hidden and weight; rows whose upstream gradient is 0 cost nothing in backward.

    `linear_policy_loss` computes log-probs with the same arithmetic: between the two, and between chunk sizes, a
    log-prob can differ only by the summation order that the matmul library chooses for a shape.
    Inside torch.compile the call is one opaque operator, with the same bits.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_target(target_N, hidden_ND)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    budget = budget or default_budget(hidden_ND.device)
    check_budget(budget, hidden_ND)
    if torch.compiler.is_compiling():
        constants = (float(temperature), vocab_size, group_name(tp_group), budget_numbers(budget))
        _, _, logp_N, entropy_N = _logprob_op(hidden_ND, weight_VD, target_N, *constants)
    else:
        shard = vocab_shard(weight_VD, vocab_size, tp_group)
        logp_N, entropy_N = _LinearLogprob.apply(hidden_ND, weight_VD, target_N, shard, temperature, budget)
    return (logp_N, entropy_N) if return_entropy else logp_N
