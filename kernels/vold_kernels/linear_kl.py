"""Divergence between two language-model heads over the vocabulary, from hidden states to gradients in one pass.

Why: on-policy distillation from logits (SDPO, VA-OPD, exact KL) needs the student's and the teacher's distribution of
every token, but never both [N, V] matrices at once. Both logits of one chunk of tokens are resident together;
normalisers -> divergence -> dlogits over the student's -> dH, dW happen before the next chunk. Matmul work: 6NDV for
the student, 2NEV for the teacher, which gets no gradient.

    L = Σ weight · KL       with p the student's softmax, q the teacher's, both at this temperature (no T² factor)
    reverse_kl   KL(S‖T) = Σ p log p/q
    forward_kl   KL(T‖S) = Σ q log q/p
    jsd          α KL(T‖M) + (1 − α) KL(S‖M),   M = α T + (1 − α) S
                 as in GKD with β = α. J/α -> forward_kl as α -> 0 and J/(1 − α) -> reverse_kl as α -> 1; α = ½ is the
                 symmetric Jensen-Shannon divergence, ≤ log 2.
    top_k        the same sums over top_k + 1 buckets: the student's top_k columns, one by one, and the tail as one
                 bucket. The choice of columns is held fixed in the gradient. Never more than the full divergence.
                 Columns tied for the last place are chosen arbitrarily.

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, k columns of the top, D and E hidden of student and
teacher, R ranks, V vocabulary, U = this rank's rows. The formulas are in `divergence.py`, the kernels in
`pairs_triton.py`, the specification in `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .checks import check_divergence, check_filter, check_head, check_main_grad, check_pair
from .chunks import ChunkBudget, default_budget
from .divergence import Divergence, derivative, summands
from .head import GradientRequest, Head, HeadGradients, OnePassBackward, ResidentChunk, needs_gradient, resident_chunks
from .operators import (
    budget_from_numbers,
    budget_numbers,
    fake_outputs,
    gradient_outputs,
    gradient_shapes,
    register_backward,
)
from .pairs import pair_functions
from .softmax import EMPTY, SoftmaxStatistics
from .types import KLLoss
from .vocab import VocabShard, all_gather, all_reduce_, group_from_name, group_name, merge, vocab_shard


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    """The rows of both heads."""
    temperature: float
    budget: ChunkBudget
    divergence: Divergence
    top_k: int | None
    request: GradientRequest
    """The student's gradients."""


@dataclass(frozen=True)
class _ChunkPair:
    """The same tokens under both heads."""

    head: Head
    """The student's."""
    student: ResidentChunk
    teacher: ResidentChunk

    def normalisers(self) -> Tensor:
        """[4, C] max and log_sum of the student, then of the teacher, over all ranks: one MAX, one SUM for both."""
        tokens = len(self.student.rows_C)
        folded = self.head.empty_statistics(2 * tokens)  # [4, 2C]: the student's, then the teacher's
        no_target_C = self.head.local_target(self.student.target_C)
        for chunk, part_4C in ((self.student, folded[:, :tokens]), (self.teacher, folded[:, tokens:])):
            self.head.fold_(part_4C, chunk.z_CU, no_target_C, 0)
        max_2C, sum_2C, _, _ = merge(folded, self.head.shard.group)  # [2C] each
        return torch.stack((max_2C, sum_2C.log())).view(2, 2, tokens).transpose(0, 1).reshape(4, tokens)


def _full_vocabulary(
    pair: _ChunkPair, weight_C: Tensor, divergence: Divergence, gradients: HeadGradients
) -> tuple[Tensor, Tensor | None]:
    """([C] divergences, [C, U] weighted gradient of the student's logits or None where none is requested)."""
    z_CU, t_CU, shard = pair.student.z_CU, pair.teacher.z_CU, pair.head.shard
    functions, real_rows = pair_functions(z_CU.device), shard.real_rows
    normaliser_4C = pair.normalisers()
    sums_2C = torch.empty_like(normaliser_4C[:2])
    functions.divergence_(sums_2C, z_CU, t_CU, real_rows, normaliser_4C, divergence)
    kl_C, mean_log_ratio_C = all_reduce_(sums_2C, shard.group)
    if not gradients.request.any:
        return kl_C, None
    dz_CU, weight_C = gradients.storage(pair.student), weight_C / pair.head.temperature
    per_token = (normaliser_4C, mean_log_ratio_C, weight_C)
    functions.divergence_dlogits_(dz_CU, z_CU, t_CU, real_rows, *per_token, divergence)
    return kl_C, dz_CU


def _top_and_tail(
    pair: _ChunkPair, weight_C: Tensor, divergence: Divergence, gradients: HeadGradients, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """As `_full_vocabulary`, with the columns outside the top as one bucket.

    The top's logits are removed from both chunks, so that the row functions of a softmax compute the tail alone: its
    probability never comes from 1 − Σ p, and its gradient is a multiple of its own softmax.
    """
    z_CU, t_CU, shard = pair.student.z_CU, pair.teacher.z_CU, pair.head.shard
    normaliser_4C = pair.normalisers()
    column_Ck, in_top_Ck = _top_columns(z_CU, shard, top_k)
    logp_Ck = _extract_logits_(z_CU, column_Ck, in_top_Ck) - normaliser_4C[0, :, None] - normaliser_4C[1, :, None]
    logq_Ck = _extract_logits_(t_CU, column_Ck, in_top_Ck) - normaliser_4C[2, :, None] - normaliser_4C[3, :, None]
    tail_4C = pair.normalisers()
    tail_logp_C, tail_logq_C = ((tail_4C - normaliser_4C).view(2, 2, -1)).sum(dim=1)
    sums_2C = torch.stack([x.where(in_top_Ck, 0.0).sum(dim=1) for x in summands(logp_Ck, logq_Ck, divergence)])
    tail_2C = torch.stack(summands(tail_logp_C, tail_logq_C, divergence))
    kl_C, mean_log_ratio_C = all_reduce_(sums_2C, shard.group) + tail_2C
    if not gradients.request.any:
        return kl_C, None
    d_tail_C = weight_C * derivative(tail_logp_C, tail_logq_C, mean_log_ratio_C, divergence)
    tail = SoftmaxStatistics(tail_4C[0].contiguous(), tail_4C[1].contiguous(), tail_logp_C, tail_logp_C)
    dz_CU = gradients.dlogits_(pair.student, tail, -d_tail_C)
    d_top_Ck = derivative(logp_Ck, logq_Ck, mean_log_ratio_C[:, None], divergence)
    d_top_Ck = weight_C[:, None] / pair.head.temperature * d_top_Ck
    dz_CU.scatter_(1, column_Ck, d_top_Ck.to(dz_CU.dtype).where(in_top_Ck, dz_CU.gather(1, column_Ck)))
    return kl_C, dz_CU


def _top_columns(z_CU: Tensor, shard: VocabShard, top_k: int) -> tuple[Tensor, Tensor]:
    """([C, k] this rank's candidates for the top of all ranks, distinct columns; [C, k] True where they are in it)."""
    tokens, rows = z_CU.shape
    z_CU.masked_fill_(torch.arange(rows, device=z_CU.device) >= shard.real_rows, EMPTY)
    logit_Ck, column_Ck = z_CU.topk(min(top_k, rows), dim=1)
    candidate_RCk = all_gather(pad(logit_Ck, (0, top_k - logit_Ck.shape[1]), value=EMPTY), shard)
    candidate_CX = candidate_RCk.transpose(0, 1).reshape(tokens, -1)  # X = R · k
    in_top_CX = torch.zeros_like(candidate_CX, dtype=torch.bool)
    in_top_CX.scatter_(1, candidate_CX.topk(top_k, dim=1).indices, True)
    in_top_Ck = in_top_CX[:, shard.rank * top_k :][:, : logit_Ck.shape[1]]
    return column_Ck, in_top_Ck & (column_Ck < shard.real_rows)


def _extract_logits_(z_CU: Tensor, column_Ck: Tensor, in_top_Ck: Tensor) -> Tensor:
    """[C, k] the logits at these columns. Those in the top are replaced in z_CU by EMPTY, a finite −inf."""
    logit_Ck = z_CU.gather(1, column_Ck)
    z_CU.scatter_(1, column_Ck, logit_Ck.masked_fill(in_top_Ck, EMPTY))
    return logit_Ck


def _one_pass(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], weight_N: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """(rows that carry weight, their weights, their divergences, gradients); student and teacher: (hidden, weight)."""
    heads = [Head(x[1], options.shard, options.temperature, options.budget) for x in (student, teacher)]
    # The host waits here, once; chunks are those of the widest shard (see `linear_policy_loss._one_pass`).
    rows_n = (weight_N != 0).nonzero()[:, 0]
    tokens = heads[0].resident_tokens(2 * options.shard.widest_shard(), len(rows_n), buffers=1)
    weight_n = weight_N[rows_n].to(heads[0].dtype)
    kl_n = torch.empty_like(weight_n)
    no_target_N = torch.full_like(weight_N, -1, dtype=torch.int64)
    gradients = HeadGradients(heads[0], len(rows_n), options.request)
    student_chunks, teacher_chunks = (
        resident_chunks(head, x[0], no_target_N, rows_n, tokens=tokens)
        for head, x in zip(heads, (student, teacher), strict=True)
    )
    for chunk, teacher_chunk in zip(student_chunks, teacher_chunks, strict=True):
        pair, weight_C = _ChunkPair(heads[0], chunk, teacher_chunk), weight_n[chunk.kept]
        if options.top_k is None:
            kl_C, dz_CU = _full_vocabulary(pair, weight_C, options.divergence, gradients)
        else:
            kl_C, dz_CU = _top_and_tail(pair, weight_C, options.divergence, gradients, options.top_k)
        kl_n[chunk.kept] = kl_C
        if dz_CU is not None:
            gradients.backward_matmuls_(chunk, dz_CU)
    return rows_n, weight_n, kl_n, gradients


def _results(
    rows_n: Tensor, weight_n: Tensor, kl_n: Tensor, gradients: HeadGradients, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `KLLoss`. `gradients.finish` comes first."""
    return (weight_n * kl_n).sum(), kl_n.new_zeros(tokens).index_copy_(0, rows_n, kl_n), gradients.dropped_mass


class _LinearKL(torch.autograd.Function):
    """Forward forms the gradients, backward multiplies them by the upstream factor."""

    @staticmethod
    def forward(
        ctx,
        student_hidden_ND: Tensor,
        student_weight_UD: Tensor,
        teacher_hidden_NE: Tensor,
        teacher_weight_UE: Tensor,
        weight_N: Tensor,
        options: _Options,
    ):
        student, teacher = (student_hidden_ND, student_weight_UD), (teacher_hidden_NE, teacher_weight_UE)
        rows_n, weight_n, kl_n, gradients = _one_pass(student, teacher, weight_N, options)
        ctx.save_for_backward(rows_n, *gradients.finish())
        ctx.backward_of_loss = OnePassBackward(len(student_hidden_ND), student_hidden_ND.dtype, options.request)
        loss, *detached = _results(rows_n, weight_n, kl_n, gradients, len(student_hidden_ND))
        ctx.mark_non_differentiable(*detached)
        return loss, *detached

    @staticmethod
    @once_differentiable
    # once_differentiable's type hides the name of its first parameter.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.backward_of_loss(ctx.saved_tensors, grad_outputs[0]), None, None, None, None


# The same pass as an opaque operator for torch.compile. Eager calls use the class above.


@torch.library.custom_op("vold_kernels::linear_kl", mutates_args=())
def _kl_op(
    student_hidden_ND: Tensor,
    student_weight_UD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    weight_N: Tensor,
    needs_grad: list[bool],
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
    kind: str,
    top_k: int | None,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `KLLoss`, then `gradient_outputs`."""
    alpha, temperature, filter_eps = numbers
    shard = vocab_shard(student_weight_UD, vocab_size, group_from_name(group))
    request = GradientRequest(needs_grad[0], needs_grad[1], filter_eps=filter_eps)
    options = _Options(shard, temperature, budget_from_numbers(budget), Divergence(kind, alpha), top_k, request)
    student, teacher = (student_hidden_ND, student_weight_UD), (teacher_hidden_NE, teacher_weight_UE)
    rows_n, weight_n, kl_n, gradients = _one_pass(student, teacher, weight_N, options)
    d_head = gradient_outputs(rows_n, gradients, len(student_hidden_ND))
    return *_results(rows_n, weight_n, kl_n, gradients, len(student_hidden_ND)), *d_head


@_kl_op.register_fake
def _(hidden_ND, weight_UD, _teacher_hidden, _teacher_weight, weight_N, needs_grad, *_):
    return fake_outputs(hidden_ND, (), weight_N.shape, (), *gradient_shapes(hidden_ND, weight_UD, needs_grad))


register_backward(_kl_op)


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
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    budget: ChunkBudget | None = None,
    weight_main_grad: Tensor | None = None,
    filter_eps: float = 0.0,
) -> KLLoss:
    """Σ weight · KL between student and teacher, gradients formed in the same pass: formulas at the top of this file.

    student_hidden_ND [N, D], student_weight_VD [V, D], teacher_hidden_NE [N, E], teacher_weight_VE [V, E]: bf16, fp32
        or fp64, the same for all; hidden may be non-contiguous, D and E may differ.
    weight_N [N]: masks, per-token ratios and the normaliser 1/Z. Rows of weight 0 are dropped before the first matmul:
        whatever they hold, NaN included, changes nothing, and their gradient is exactly zero.
    divergence: "reverse_kl", "forward_kl" or "jsd"; alpha in (0, 1) is the teacher's share of jsd's mixture.
    top_k: None for the full vocabulary, else the student's top_k columns plus one tail bucket. The gradient does not
        follow the choice of columns.
    tp_group: both weights hold this rank's consecutive rows, equally many of each; all else is replicated, and the
        hidden gradient is summed over ranks here. top_k counts columns over all ranks.
    vocab_size: ids shared by both heads, over all ranks; rows at or beyond it are −inf on both sides and get exactly
        zero gradient. Needed where the two weights differ in rows (without tp_group).
    weight_main_grad [V, D]: as for `linear_policy_loss`, of the student's weight; scale weight_N instead of the loss.
    filter_eps: as for `linear_policy_loss`.
    Returns `KLLoss`; `loss` is differentiable with respect to the student's hidden and weight, never the teacher's.
    Precision, accumulation, frozen sides and torch.compile: as for `linear_policy_loss`.
    Raises ValueError for shapes, dtypes, devices or options that do not fit.
    """
    kind = Divergence(divergence, alpha)
    student, teacher = (student_hidden_ND, student_weight_VD), (teacher_hidden_NE, teacher_weight_VE)
    for head in (student, teacher):
        check_head(*head, temperature=temperature)
    check_pair(student, teacher, vocab_size, sharded=tp_group is not None)
    check_divergence(kind, top_k, weight_N, len(student_hidden_ND))
    check_main_grad(weight_main_grad, student_weight_VD)
    check_filter(filter_eps)
    budget = budget or default_budget(student_hidden_ND.device)
    if budget.bf16_logits:
        raise ValueError("budget.bf16_logits is True; linear_kl compares two full distributions and needs fp32 logits")
    rows = min(len(student_weight_VD), len(teacher_weight_VE))
    heads = (student_hidden_ND, student_weight_VD[:rows], teacher_hidden_NE.detach(), teacher_weight_VE[:rows].detach())
    needs_grad = [needs_gradient(x) for x in student]
    if torch.compiler.is_compiling():
        numbers = [float(x) for x in (alpha, temperature, filter_eps)]
        constants = (needs_grad, vocab_size, group_name(tp_group), budget_numbers(budget), divergence, top_k, numbers)
        return KLLoss(*_kl_op(*heads, weight_N, *constants)[:-2])
    main_grad = None if weight_main_grad is None else weight_main_grad[:rows]
    shard = vocab_shard(heads[1], vocab_size, tp_group)
    request = GradientRequest(needs_grad[0], needs_grad[1], main_grad_UD=main_grad, filter_eps=filter_eps)
    options = _Options(shard, temperature, budget, kind, top_k, request)
    return KLLoss(*_LinearKL.apply(*heads, weight_N, options))
