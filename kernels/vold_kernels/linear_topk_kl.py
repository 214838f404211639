"""Divergence between a language-model head and given top-k log-probs of a teacher, from hidden states to gradients in
one pass.

Why: a server hands over a teacher's k most probable ids with their log-probs, not its distribution. Compared are k + 1
buckets: those ids one by one, and all others as one, whose teacher mass is 1 − Σ q. The sums are those of `linear_kl`
over the buckets: never more than the full divergence, and 0 where they agree. Matmul work: 6NDV.

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, k ids of the top, D hidden, V vocabulary, U = this
rank's rows. The specification is in `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_divergence, check_head, check_main_grad, check_vocab_size
from .chunks import ChunkBudget, default_budget
from .divergence import Divergence, derivative, summands
from .head import GradientRequest, Head, HeadGradients, OnePassBackward, ResidentChunk, needs_gradient, resident_chunks
from .softmax import EMPTY, SoftmaxStatistics
from .types import KLLoss
from .vocab import VocabShard, all_reduce_, merge, vocab_shard

LEAST_TAIL = 1e-12
"""Smallest teacher mass of the tail: rounded log-probs may add up to a little more than 1."""


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    temperature: float
    budget: ChunkBudget
    divergence: Divergence
    request: GradientRequest


@dataclass(frozen=True)
class _Top:
    """The teacher's top of some tokens: ids over all ranks, −1 where there is none, and log-probs, −inf there."""

    id_Ck: Tensor
    logq_Ck: Tensor

    @classmethod
    def of(cls, id_Ck: Tensor, logq_Ck: Tensor, vocab_size: Tensor) -> "_Top":
        """Ids that are not the vocabulary's, as a server's head may have them, are none: their mass is the tail's."""
        is_real_Ck = (id_Ck >= 0) & (id_Ck < vocab_size)
        return cls(id_Ck.where(is_real_Ck, -1), logq_Ck.where(is_real_Ck, -torch.inf))

    def tail_logq(self) -> Tensor:
        """[C] log of the mass of all other ids."""
        return torch.log1p(-self.logq_Ck.double().exp().sum(dim=1).clamp(max=1 - LEAST_TAIL)).to(self.logq_Ck.dtype)


def _max_and_log_sum(head: Head, z_CU: Tensor) -> Tensor:
    """[2, C] of the logits over all ranks."""
    no_target_C = torch.full((len(z_CU),), -1, dtype=torch.int64, device=z_CU.device)
    folded_4C = head.empty_statistics(len(z_CU))
    head.fold_(folded_4C, z_CU, head.local_target(no_target_C), 0)
    max_C, sum_C, _, _ = merge(folded_4C, head.shard.group)
    return torch.stack((max_C, sum_C.log()))


def _chunk(
    head: Head, chunk: ResidentChunk, top: _Top, weight_C: Tensor, divergence: Divergence, gradients: HeadGradients
) -> tuple[Tensor, Tensor | None]:
    """([C] divergences, [C, U] weighted gradient of the logits or None where none is requested)."""
    z_CU, shard = chunk.z_CU, head.shard
    normaliser_2C = _max_and_log_sum(head, z_CU)
    column_Ck = top.id_Ck - shard.offset
    is_here_Ck = (column_Ck >= 0) & (column_Ck < shard.real_rows) & (top.id_Ck >= 0)
    column_Ck = column_Ck.where(is_here_Ck, 0)
    logit_Ck = all_reduce_(z_CU.gather(1, column_Ck).to(head.dtype).where(is_here_Ck, 0.0), shard.group)
    # Those of the top leave the tail; a column that stands in for an id of another rank keeps its logit.
    gone_Ck = torch.full_like(logit_Ck, EMPTY).where(is_here_Ck, torch.inf)
    z_CU.scatter_reduce_(1, column_Ck, gone_Ck.to(z_CU.dtype), "amin")
    tail_2C = _max_and_log_sum(head, z_CU)
    tail_logp_C, tail_logq_C = (tail_2C - normaliser_2C).sum(dim=0), top.tail_logq()
    is_real_Ck = top.id_Ck >= 0
    logp_Ck = logit_Ck - normaliser_2C[0, :, None] - normaliser_2C[1, :, None]
    logq_Ck = top.logq_Ck.where(is_real_Ck, logp_Ck)  # finite; masked below
    sums_2C = torch.stack([x.where(is_real_Ck, 0.0).sum(dim=1) for x in summands(logp_Ck, logq_Ck, divergence)])
    kl_C, mean_log_ratio_C = sums_2C + torch.stack(summands(tail_logp_C, tail_logq_C, divergence))
    if not gradients.request.any:
        return kl_C, None
    d_tail_C = weight_C * derivative(tail_logp_C, tail_logq_C, mean_log_ratio_C, divergence)
    tail = SoftmaxStatistics(tail_2C[0].contiguous(), tail_2C[1].contiguous(), tail_logp_C, tail_logp_C)
    dz_CU = gradients.dlogits_(chunk, tail, -d_tail_C)
    d_top_Ck = derivative(logp_Ck, logq_Ck, mean_log_ratio_C[:, None], divergence)
    d_top_Ck = (weight_C[:, None] / head.temperature * d_top_Ck).where(is_here_Ck, 0.0)
    dz_CU.scatter_add_(1, column_Ck, d_top_Ck.to(dz_CU.dtype))  # what was there is 0, and others add 0
    return kl_C, dz_CU


class _LinearTopkKL(torch.autograd.Function):
    """Forward forms the gradients, backward multiplies them by the upstream factor."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_UD: Tensor, id_Nk: Tensor, logq_Nk: Tensor, weight_N, options: _Options):
        head = Head(weight_UD, options.shard, options.temperature, options.budget)
        rows_n = (weight_N != 0).nonzero()[:, 0]  # the host waits here, once
        tokens = head.resident_tokens(options.shard.widest_shard(), len(rows_n), buffers=1)
        weight_n, kl_n = weight_N[rows_n].to(head.dtype), weight_N.new_zeros(len(rows_n), dtype=head.dtype)
        gradients = HeadGradients(head, len(rows_n), options.request)
        no_target_N = torch.full_like(weight_N, -1, dtype=torch.int64)
        for chunk in resident_chunks(head, hidden_ND, no_target_N, rows_n, tokens=tokens):
            logq_Ck = logq_Nk[chunk.rows_C].to(head.dtype)
            top = _Top.of(id_Nk[chunk.rows_C].long(), logq_Ck, options.shard.vocab_size)
            kl_C, dz_CU = _chunk(head, chunk, top, weight_n[chunk.kept], options.divergence, gradients)
            kl_n[chunk.kept] = kl_C
            if dz_CU is not None:
                gradients.backward_matmuls_(chunk, dz_CU)
        ctx.save_for_backward(rows_n, *gradients.finish())
        ctx.backward_of_loss = OnePassBackward(len(hidden_ND), hidden_ND.dtype, options.request)
        kl_N = kl_n.new_zeros(len(hidden_ND)).index_copy_(0, rows_n, kl_n)
        detached = (kl_N, gradients.dropped_mass)
        ctx.mark_non_differentiable(*detached)
        return (weight_n * kl_n).sum(), *detached

    @staticmethod
    @once_differentiable
    # once_differentiable's type hides the name of its first parameter.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.backward_of_loss(ctx.saved_tensors, grad_outputs[0]), None, None, None, None


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
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    budget: ChunkBudget | None = None,
    weight_main_grad: Tensor | None = None,
) -> KLLoss:
    """Σ weight · divergence between student and the teacher's top k with its tail, gradients formed in the same pass.

    id_Nk [N, k] integer: distinct ids of a token over all ranks, fewer than the vocabulary has; −1, or an id beyond the
        vocabulary, for none.
    logp_teacher_Nk [N, k]: their log-probs (nats), −inf for none.
    Others as for `linear_kl`; not under torch.compile. Raises ValueError for shapes, dtypes or options that do not fit.
    """
    kind = Divergence(divergence, alpha)
    check_head(hidden_ND, weight_VD, temperature=temperature)
    check_vocab_size(weight_VD, vocab_size, sharded=tp_group is not None)
    check_divergence(kind, None, weight_N, len(hidden_ND))
    check_main_grad(weight_main_grad, weight_VD)
    if id_Nk.shape != logp_teacher_Nk.shape or len(id_Nk) != len(hidden_ND) or id_Nk.dtype.is_floating_point:
        raise ValueError(
            f"ids are {tuple(id_Nk.shape)} {id_Nk.dtype} and their log-probs {tuple(logp_teacher_Nk.shape)}; both must "
            f"be [{len(hidden_ND)}, k], the ids integer"
        )
    if torch.compiler.is_compiling():
        raise ValueError("linear_topk_kl does not run under torch.compile; call it outside")
    budget = budget or default_budget(hidden_ND.device)
    request = GradientRequest(needs_gradient(hidden_ND), needs_gradient(weight_VD), main_grad_UD=weight_main_grad)
    options = _Options(vocab_shard(weight_VD, vocab_size, tp_group), temperature, budget, kind, request)
    return KLLoss(*_LinearTopkKL.apply(hidden_ND, weight_VD, id_Nk, logp_teacher_Nk, weight_N, options))
