"""Divergence between two language-model heads over the vocabulary, from hidden states to gradients in one pass.

Why: on-policy distillation from logits (SDPO, VA-OPD, exact KL) needs the student's and the teacher's distribution of
every token, and nobody needs both [N, V] matrices. One chunk of tokens holds both logits; normalisers -> divergence ->
dlogits over the student's -> dH, dW happen while it is resident. Matmul work: 6NDV for the student, 2NEV for the
teacher, which gets no gradient.

    L = Σ weight · KL        with p the student's softmax, q the teacher's, both at this temperature (no T² factor)
    reverse   KL(S‖T) = Σ p log p/q
    forward   KL(T‖S) = Σ q log q/p
    jsd       α KL(T‖M) + (1 − α) KL(S‖M),   M = α T + (1 − α) S
              as in GKD with β = α. J/α -> forward as α -> 0 and J/(1 − α) -> reverse as α -> 1; α = ½ is the symmetric
              Jensen-Shannon divergence, ≤ log 2.
    top_k     the same sums over top_k + 1 buckets: the student's top_k columns, one by one, and the rest together. The
              choice of columns is held fixed in the gradient. Never more than the full divergence. Columns tied for
              the last place are chosen arbitrarily.

Shape letters: N tokens, n tokens with weight, C tokens of a chunk, k columns of the top, D and E hidden of student and
teacher, V vocabulary, U = this rank's rows. The kernels are in `pairs_triton.py`, the specification in `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .checks import check_divergence, check_filter, check_head, check_main_grad, check_pair
from .chunks import ChunkBudget, default_budget
from .head import GradientRequest, Head, HeadGradients, OnePass, Resident, resident_chunks
from .operators import fake, gradient_outputs, gradient_shapes, register_backward
from .pairs import Divergence, pair_functions, slope, summands
from .rows import EMPTY, Statistics
from .types import KLLoss
from .vocab import VocabShard, all_reduce_, gather, group_name, group_named, merge, vocab_shard

__all__ = ["KLLoss", "linear_kl"]


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    """Of both heads."""
    temperature: float
    budget: ChunkBudget
    divergence: Divergence
    top_k: int | None
    wanted: GradientRequest
    """Of the student's head."""


@dataclass(frozen=True)
class _Pair:
    """The same tokens under both heads."""

    head: Head
    """The student's."""
    student: Resident
    teacher: Resident

    def normalisers(self) -> Tensor:
        """[4, C] top and log_total of the student, then of the teacher, over all ranks: one MAX, one SUM for both."""
        tokens = len(self.student.rows_C)
        folded = self.head.new_statistics(2 * tokens)  # [4, 2C]: the student's, then the teacher's
        nowhere_C = self.head.local(self.student.target_C)
        for chunk, part in ((self.student, folded[:, :tokens]), (self.teacher, folded[:, tokens:])):
            self.head.fold_(part, chunk.z_CU, nowhere_C, 0)
        top, total, _, _ = merge(folded, self.head.shard.group)
        return torch.stack((top, total.log())).view(2, 2, tokens).transpose(0, 1).reshape(4, tokens)


def _full_vocabulary(
    pair: _Pair, weight_C: Tensor, divergence: Divergence, gradients: HeadGradients
) -> tuple[Tensor, Tensor | None]:
    """(divergence of each token, weighted gradient of the student's logits where one is wanted)."""
    z_CU, t_CU, shard = pair.student.z_CU, pair.teacher.z_CU, pair.head.shard
    functions = pair_functions(z_CU.device)
    norm_4C = pair.normalisers()
    sums_2C = torch.empty_like(norm_4C[:2])
    functions.divergence_(sums_2C, z_CU, t_CU, shard.real, norm_4C, divergence)
    kl_C, own_C = all_reduce_(sums_2C, shard.group)
    if not gradients.wanted:
        return kl_C, None
    dz_CU, weight_C = gradients.storage(pair.student), weight_C / pair.head.temperature
    functions.divergence_dlogits_(dz_CU, z_CU, t_CU, shard.real, norm_4C, own_C, weight_C, divergence)
    return kl_C, dz_CU


def _top_and_tail(
    pair: _Pair, weight_C: Tensor, divergence: Divergence, gradients: HeadGradients, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """As `_full_vocabulary`, with the columns outside the top as one bucket.

    The top's logits are taken out of both chunks, so that the row functions of a softmax see the tail alone: its
    probability never comes from 1 − Σ p, and its gradient is a multiple of its own softmax.
    """
    z_CU, t_CU, shard = pair.student.z_CU, pair.teacher.z_CU, pair.head.shard
    norm_4C = pair.normalisers()
    column_Ck, mine_Ck = _top_columns(z_CU, shard, top_k)
    logp_Ck = _take_out_(z_CU, column_Ck, mine_Ck) - norm_4C[0, :, None] - norm_4C[1, :, None]
    logq_Ck = _take_out_(t_CU, column_Ck, mine_Ck) - norm_4C[2, :, None] - norm_4C[3, :, None]
    tail_4C = pair.normalisers()
    tail_logp_C, tail_logq_C = ((tail_4C - norm_4C).view(2, 2, -1)).sum(dim=1)
    sums_2C = torch.stack([x.where(mine_Ck, 0.0).sum(dim=1) for x in summands(logp_Ck, logq_Ck, divergence)])
    kl_C, own_C = all_reduce_(sums_2C, shard.group) + torch.stack(summands(tail_logp_C, tail_logq_C, divergence))
    if not gradients.wanted:
        return kl_C, None
    tail_slope_C = weight_C * slope(tail_logp_C, tail_logq_C, own_C, divergence)
    tail = Statistics(tail_4C[0].contiguous(), tail_4C[1].contiguous(), tail_logp_C, tail_logp_C)
    dz_CU = gradients.dlogits_(pair.student, tail, -tail_slope_C)
    slope_Ck = weight_C[:, None] / pair.head.temperature * slope(logp_Ck, logq_Ck, own_C[:, None], divergence)
    dz_CU.scatter_(1, column_Ck, slope_Ck.to(dz_CU.dtype).where(mine_Ck, dz_CU.gather(1, column_Ck)))
    return kl_C, dz_CU


def _top_columns(z_CU: Tensor, shard: VocabShard, top_k: int) -> tuple[Tensor, Tensor]:
    """[C, k] this rank's candidates for the top of all ranks (distinct columns), and which of them belong to it."""
    tokens, rows = z_CU.shape
    z_CU.masked_fill_(torch.arange(rows, device=z_CU.device) >= shard.real, EMPTY)
    logit_Ck, column_Ck = z_CU.topk(min(top_k, rows), dim=1)
    everyone_RCk = gather(pad(logit_Ck, (0, top_k - logit_Ck.shape[1]), value=EMPTY), shard)
    flat_CX = everyone_RCk.transpose(0, 1).reshape(tokens, -1)  # X = R · k
    won_CX = torch.zeros_like(flat_CX, dtype=torch.bool).scatter_(1, flat_CX.topk(top_k, dim=1).indices, True)
    won_Ck = won_CX[:, shard.rank * top_k :][:, : logit_Ck.shape[1]]
    return column_Ck, won_Ck & (column_Ck < shard.real)


def _take_out_(z_CU: Tensor, column_Ck: Tensor, mine_Ck: Tensor) -> Tensor:
    """The logits at these columns; those that are mine are left as good as −inf (finite, see `rows.EMPTY`)."""
    logit_Ck = z_CU.gather(1, column_Ck)
    z_CU.scatter_(1, column_Ck, logit_Ck.masked_fill(mine_Ck, EMPTY))
    return logit_Ck


def _one_pass(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], weight_N: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """(kept rows, their weights, their divergences, gradients)"""
    heads = [Head(x[1], options.shard, options.temperature, options.budget) for x in (student, teacher)]
    # The host waits here, once; chunks are those of the widest shard (see `linear_policy_loss._one_pass`).
    rows_n = (weight_N != 0).nonzero()[:, 0]
    tokens = heads[0].resident_tokens(2 * options.shard.widest(), len(rows_n))
    weight_n = weight_N[rows_n].to(heads[0].dtype)
    kl_n = torch.empty_like(weight_n)
    nowhere_N = torch.full_like(weight_N, -1, dtype=torch.int64)
    gradients = HeadGradients(heads[0], len(rows_n), options.wanted)
    chunks = (
        resident_chunks(head, x[0], nowhere_N, rows_n, tokens=tokens)
        for head, x in zip(heads, (student, teacher), strict=True)
    )
    for chunk, teacher_chunk in zip(*chunks, strict=True):
        pair, weight_C = _Pair(heads[0], chunk, teacher_chunk), weight_n[chunk.where]
        if options.top_k is None:
            kl_C, dz_CU = _full_vocabulary(pair, weight_C, options.divergence, gradients)
        else:
            kl_C, dz_CU = _top_and_tail(pair, weight_C, options.divergence, gradients, options.top_k)
        kl_n[chunk.where] = kl_C
        if dz_CU is not None:
            gradients.backward_matmuls_(chunk, dz_CU)
    return rows_n, weight_n, kl_n, gradients


def _results(
    rows_n: Tensor, weight_n: Tensor, kl_n: Tensor, gradients: HeadGradients, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `KLLoss`. The gradients must be finished."""
    return (weight_n * kl_n).sum(), kl_n.new_zeros(tokens).index_copy_(0, rows_n, kl_n), gradients.dropped_mass


class _LinearKL(torch.autograd.Function):
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
        ctx.one_pass = OnePass(len(student_hidden_ND), student_hidden_ND.dtype, options.wanted)
        loss, *detached = _results(rows_n, weight_n, kl_n, gradients, len(student_hidden_ND))
        ctx.mark_non_differentiable(*detached)
        return loss, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, *_):
        """The gradients exist already; only the upstream factor is missing."""
        return *ctx.one_pass.backward(ctx.saved_tensors, d_loss), None, None, None, None


# The same pass as an operator that torch.compile holds without looking inside. Eager calls take the class above.


@torch.library.custom_op("vold_kernels::linear_kl", mutates_args=())
def _kl_op(
    student_hidden_ND: Tensor,
    student_weight_UD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    weight_N: Tensor,
    wanted: list[bool],
    vocab_size: int | None,
    group: str | None,
    budget: list[int],
    kind: str,
    top_k: int | None,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `KLLoss`, dH [N, D] and dW as accumulated."""
    alpha, temperature, filter_eps = numbers
    shard = vocab_shard(student_weight_UD, vocab_size, group_named(group))
    wants = GradientRequest(*wanted, filter_eps=filter_eps)
    options = _Options(shard, temperature, ChunkBudget(*budget), Divergence(kind, alpha), top_k, wants)
    student, teacher = (student_hidden_ND, student_weight_UD), (teacher_hidden_NE, teacher_weight_UE)
    rows_n, weight_n, kl_n, gradients = _one_pass(student, teacher, weight_N, options)
    d_head = gradient_outputs(rows_n, gradients, len(student_hidden_ND))
    return *_results(rows_n, weight_n, kl_n, gradients, len(student_hidden_ND)), *d_head


@_kl_op.register_fake
def _(hidden_ND, weight_UD, _teacher_hidden, _teacher_weight, weight_N, wanted, *_):
    return fake(hidden_ND, (), weight_N.shape, (), *gradient_shapes(hidden_ND, weight_UD, wanted))


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
    """Σ weight · KL between student and teacher: the formulas at the top of this file.

    student_hidden_ND [N, D], student_weight_VD [V, D], teacher_hidden_NE [N, E], teacher_weight_VE [V, E]: bf16, fp32
        or fp64, the same for all; hidden may be non-contiguous, D and E may differ.
    weight_N [N]: masks, per-token ratios and the normaliser 1/Z. Rows of weight 0 are dropped before the first matmul:
        whatever they hold, NaN included, changes nothing, and their gradient is exactly zero.
    divergence: "reverse_kl", "forward_kl" or "jsd"; alpha in (0, 1) is the teacher's share of jsd's mixture.
    top_k: None for the full vocabulary, else the student's top_k columns plus one tail bucket. The gradient does not
        follow the choice of columns.
    tp_group: both weights hold this rank's consecutive rows, equally many of each; all else is replicated, and the
        hidden gradient is summed over ranks here. top_k means the top of all ranks.
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
    rows = min(len(student_weight_VD), len(teacher_weight_VE))
    main_grad = None if weight_main_grad is None else weight_main_grad[:rows]
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in student]
    budget = budget or default_budget(student_hidden_ND.device)
    if budget.bf16_logits:
        raise ValueError("budget.bf16_logits is True; linear_kl compares two full distributions and needs fp32 logits")
    heads = (student_hidden_ND, student_weight_VD[:rows], teacher_hidden_NE.detach(), teacher_weight_VE[:rows].detach())
    if torch.compiler.is_compiling():
        sizes, numbers = list(vars(budget).values()), [float(x) for x in (alpha, temperature, filter_eps)]
        constants = (wanted, vocab_size, group_name(tp_group), sizes, divergence, top_k, numbers)
        return KLLoss(*_kl_op(*heads, weight_N, *constants)[:-2])
    shard = vocab_shard(heads[1], vocab_size, tp_group)
    options = _Options(shard, temperature, budget, kind, top_k, GradientRequest(*wanted, main_grad, filter_eps))
    return KLLoss(*_LinearKL.apply(*heads, weight_N, options))
