"""Log-probability (and entropy) of given tokens under a language-model head, without the [N, V] logits.

Why: the teacher and the old policy need log-probs of tokens that are already known; at V = 151936 the fp32 logits of
32k tokens are 20 GB. Here cuBLAS writes one fp32 tile, a row kernel folds it into (max, Σe^x, Σx·e^x, target logit),
and the tile is reused. The differentiable form is for losses that couple tokens (GSPO): its backward recomputes the
logits (8NHV instead of 6). A loss whose per-token coefficient depends on that token alone wants `linear_policy_loss`.

Shape letters: N tokens, n tokens with a gradient, C tokens of a chunk, D hidden, V vocabulary, U = this rank's rows.
The kernels are in `rows_triton.py`, the specification in `reference.py`.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import matmuls
from .checks import check_budget, check_head, check_target, check_vocab_size
from .chunks import ChunkBudget, default_budget
from .head import GradientRequest, Head, HeadGradients, resident_chunks, scaled, scatter_rows, stream
from .rows import Statistics
from .vocab import VocabShard, group_name, group_named, vocab_shard


class _LinearLogprob(torch.autograd.Function):
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
        statistics = stream(Head(weight_UD, shard, temperature, budget), hidden_ND, target_N)
        ctx.save_for_backward(hidden_ND, target_N, weight_UD, *vars(statistics).values())
        ctx.constants = (shard, temperature, budget)
        ctx.set_materialize_grads(False)
        return statistics.logp_C, statistics.entropy_C

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp_N: Tensor | None, d_entropy_N: Tensor | None):
        hidden_ND, target_N, weight_UD, *statistics = ctx.saved_tensors
        if d_logp_N is None and d_entropy_N is None:
            return (None,) * 6
        head, wanted = Head(weight_UD, *ctx.constants), GradientRequest(*ctx.needs_input_grad[:2])
        gradients = _recompute(head, hidden_ND, target_N, Statistics(*statistics), (d_logp_N, d_entropy_N), wanted)
        return *gradients, None, None, None, None


def _recompute(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    statistics: Statistics,
    upstream: tuple[Tensor | None, Tensor | None],
    wanted: GradientRequest,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_hidden, d_weight) from the gradients of (log-prob, entropy), of which at least one is there."""
    d_logp_N, d_entropy_N = upstream
    if d_logp_N is None:
        d_logp_N = torch.zeros_like(d_entropy_N)
    rows_n = _rows_with_gradient(d_logp_N, d_entropy_N)
    gradients = HeadGradients(head, len(rows_n), wanted)
    tokens = head.resident_tokens(head.shard.rows, len(rows_n))
    for chunk in resident_chunks(head, hidden_ND, target_N, rows_n, tokens=tokens):
        d_entropy_C = None if d_entropy_N is None else d_entropy_N[chunk.rows_C]
        gradients.add_(chunk, statistics.rows(chunk.rows_C), d_logp_N[chunk.rows_C], d_entropy_C)
    d_hidden_nD, d_weight_UD = gradients.finish()
    d_hidden_ND = None
    if d_hidden_nD is not None:
        d_hidden_ND = scatter_rows(rows_n, scaled(d_hidden_nD, None, hidden_ND.dtype), len(hidden_ND))
    return d_hidden_ND, None if d_weight_UD is None else scaled(d_weight_UD, None, head.weight_UD.dtype)


def _rows_with_gradient(d_logp_N: Tensor, d_entropy_N: Tensor | None) -> Tensor:
    """Waits for the host (the number of rows is a shape): the only place of this file that does."""
    used_N = d_logp_N != 0
    if d_entropy_N is not None:
        used_N |= d_entropy_N != 0
    return used_N.nonzero()[:, 0]


# The same two passes as operators that torch.compile holds without looking inside. Eager calls take the class above.


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
    """(top, log total, log-prob, entropy)"""
    shard = vocab_shard(weight_UD, vocab_size, group_named(group))
    head = Head(weight_UD, shard, temperature, ChunkBudget(*budget))
    return tuple(vars(stream(head, hidden_ND, target_N)).values())


@_logprob_op.register_fake
def _(hidden_ND, weight_UD, *_):
    dtype = matmuls.accumulator_dtype(weight_UD.dtype)
    return tuple(hidden_ND.new_empty(len(hidden_ND), dtype=dtype) for _ in range(4))


@torch.library.custom_op("vold_kernels::linear_logprob_backward", mutates_args=())
def _logprob_backward_op(
    saved: list[Tensor],
    d_logp_N: Tensor | None,
    d_entropy_N: Tensor | None,
    wanted: list[bool],
    temperature: float,
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_weight), of which a side that is not wanted has no elements."""
    hidden_ND, target_N, weight_UD, *statistics = saved
    shard = vocab_shard(weight_UD, vocab_size, group_named(group))
    head = Head(weight_UD, shard, temperature, ChunkBudget(*budget))
    upstream = (d_logp_N, d_entropy_N)
    gradients = _recompute(head, hidden_ND, target_N, Statistics(*statistics), upstream, GradientRequest(*wanted))
    return tuple(hidden_ND.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_logprob_backward_op.register_fake
def _(saved, d_logp_N, d_entropy_N, wanted, *_):
    hidden_ND, _, weight_UD, *_ = saved
    like = [x.new_empty(x.shape if want else 0) for x, want in zip((hidden_ND, weight_UD), wanted, strict=True)]
    return tuple(like)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    hidden_ND, weight_UD, target_N, *ctx.constants = inputs
    ctx.save_for_backward(hidden_ND, target_N, weight_UD, *output)
    ctx.mark_non_differentiable(*output[:2])
    ctx.set_materialize_grads(False)


def _backward(ctx, _top, _log_total, d_logp_N: Tensor | None, d_entropy_N: Tensor | None):
    if d_logp_N is None and d_entropy_N is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:2])
    gradients = _logprob_backward_op(list(ctx.saved_tensors), d_logp_N, d_entropy_N, wanted, *ctx.constants)
    gradients = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
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
    """log softmax(hidden weightᵀ / temperature) at the targets.

    hidden_ND [N, D] and weight_VD [V, D]: bf16, fp32 or fp64, the same for both; hidden may be non-contiguous.
    target_N [N]: integer ids. An id that is no real vocabulary row gives NaN (checking would wait for the host).
    tp_group: weight_VD holds this rank's consecutive rows, in rank order; shards may be unequal. hidden, target and the
        upstream gradients are the same on every rank; the hidden gradient is summed over ranks here.
    vocab_size: real rows over all ranks; rows at or beyond it are −inf and get exactly zero gradient.
    Returns log-probs [N] in nats, fp32 (fp64 for fp64), ≤ 0; with return_entropy also the entropies [N] in nats. Both
    are differentiable with respect to hidden and weight; rows whose upstream gradient is 0 cost nothing in backward.

    The same logits, statistics and log-prob arithmetic serve `linear_policy_loss`: between the two, and between
    chunk sizes, a log-prob can differ only by the summation order the matmul library picks for a shape.
    Inside torch.compile the call is one opaque operator, with the same bits. Raises ValueError for shapes, dtypes or
    devices that do not fit.
    """
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_target(target_N, hidden_ND)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    budget = budget or default_budget(hidden_ND.device)
    check_budget(budget, hidden_ND)
    if torch.compiler.is_compiling():
        constants = (float(temperature), vocab_size, group_name(tp_group), list(vars(budget).values()))
        _, _, logp_N, entropy_N = _logprob_op(hidden_ND, weight_VD, target_N, *constants)
    else:
        shard = vocab_shard(weight_VD, vocab_size, tp_group)
        logp_N, entropy_N = _LinearLogprob.apply(hidden_ND, weight_VD, target_N, shard, temperature, budget)
    return (logp_N, entropy_N) if return_entropy else logp_N
