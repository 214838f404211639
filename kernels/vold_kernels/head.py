"""A language-model head, one chunk of tokens at a time: logits, statistics, gradients. Every loss is a loop over these.

Shape letters: N tokens, C tokens of a chunk, D hidden, U vocabulary rows of this rank, B columns of one tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import matmuls, rows_torch
from .chunks import ChunkBudget, slices
from .rows import Statistics, dlogits_storage, new_statistics, row_functions
from .vocab import VocabShard, all_reduce_, merge


@dataclass(frozen=True)
class Head:
    weight_UD: Tensor
    shard: VocabShard
    temperature: float
    budget: ChunkBudget

    @property
    def dtype(self) -> torch.dtype:
        """What statistics and gradients are computed in."""
        return matmuls.accumulator_dtype(self.weight_UD.dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """What logits are stored in: `dtype` unless the budget asks for bf16 on a GPU."""
        return torch.bfloat16 if self.budget.bf16_logits and matmuls.tensor_core(self.weight_UD) else self.dtype

    def resident_tokens(self, rows: int, total: int) -> int:
        return self.budget.resident_tokens(rows, self.logits_dtype.itemsize, total)

    def buffer(self, tokens: int, columns: int) -> Tensor:
        return torch.empty(tokens * columns, dtype=self.logits_dtype, device=self.weight_UD.device)

    def view(self, buffer: Tensor, tokens: int, columns: int) -> Tensor:
        """[C, B] in the reused buffer. A CPU keeps the tokens of one vocabulary row together: a tile is contiguous,
        and the matmul into it is up to a third faster."""
        part = buffer[: tokens * columns]
        in_torch = row_functions(buffer.device) is rows_torch
        return part.view(columns, tokens).t() if in_torch else part.view(tokens, columns)

    def logits(self, buffer: Tensor, hidden_CD: Tensor, weight_BD: Tensor) -> Tensor:
        """[C, B] logits after temperature, in the reused buffer."""
        z_CB = self.view(buffer, len(hidden_CD), len(weight_BD))
        matmuls.logits_(z_CB, hidden_CD, weight_BD, temperature=self.temperature)
        if self.budget.bf16_logits and z_CB.dtype != torch.bfloat16:
            z_CB.copy_(z_CB.bfloat16())
        return z_CB

    def local(self, target_N: Tensor) -> Tensor:
        """Target ids as rows of this rank's shard; those of other ranks fall outside it."""
        return target_N.long() - self.shard.offset

    def new_statistics(self, tokens: int) -> Tensor:
        return new_statistics(tokens, self.weight_UD, self.dtype)

    def fold_(self, folded_4C: Tensor, z_CB: Tensor, local_target_C: Tensor, first: int) -> None:
        row_functions(z_CB.device).fold_(folded_4C, z_CB, local_target_C, self.shard.real, first)


def finish(head: Head, folded_4N: Tensor, target_N: Tensor) -> Statistics:
    """This rank's folded tiles -> the softmax over all ranks."""
    top_N, total_N, spread_N, target_logit_N = merge(folded_4N, head.shard.group)
    log_total_N = total_N.log()
    exists_N = (target_N >= 0) & (target_N < head.shard.total)
    logp_N = torch.where(exists_N, (target_logit_N - top_N) - log_total_N, float("nan"))
    return Statistics(top_N, log_total_N, logp_N, log_total_N - spread_N / total_N)


def stream(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Statistics:
    """Statistics of every token through one reused tile; ranks meet once, at the end."""
    tokens, columns = head.budget.tile(head.shard.rows, head.logits_dtype.itemsize)
    buffer = head.buffer(min(tokens, len(target_N)), columns)
    folded_4N = head.new_statistics(len(target_N))
    local_target_N = head.local(target_N)
    for chunk in slices(len(target_N), tokens):
        for tile in slices(head.shard.rows, columns):
            z_CB = head.logits(buffer, hidden_ND[chunk], head.weight_UD[tile])
            head.fold_(folded_4N[:, chunk], z_CB, local_target_N[chunk], tile.start)
    return finish(head, folded_4N, target_N)


@dataclass(frozen=True)
class Resident:
    """All of this rank's logits of one chunk of rows, kept until their gradient has been formed in place."""

    where: slice
    """Which of the kept rows these are."""
    rows_C: Tensor
    """[C] int64, which rows of hidden these are."""
    hidden_CD: Tensor
    target_C: Tensor
    """Global ids."""
    z_CU: Tensor


def resident_chunks(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, *, tokens: int
) -> Iterator[Resident]:
    """The given rows, `tokens` at a time; each chunk overwrites the one before."""
    buffer = head.buffer(min(tokens, len(rows_n)), head.shard.rows)
    for where in slices(len(rows_n), tokens):
        rows_C = rows_n[where]
        hidden_CD = hidden_ND.index_select(0, rows_C)
        z_CU = head.logits(buffer, hidden_CD, head.weight_UD)
        yield Resident(where, rows_C, hidden_CD, target_N[rows_C], z_CU)


@dataclass(frozen=True)
class GradientRequest:
    """Which gradients of a head are computed, and where dW goes."""

    hidden: bool
    weight: bool
    main_grad_UD: Tensor | None = None
    """dW is added to this buffer instead of being returned."""
    filter_eps: float = 0.0
    """Share of Σ|dlogits| of a chunk that may be left out; 0 is exact."""
    entropy: bool = False
    """Whether the loss depends on the entropy too."""

    def __bool__(self) -> bool:
        return self.hidden or self.weight


class HeadGradients:
    """Where a pass over chunks leaves dH and dW: accumulated in fp32 (fp64 for fp64), rounded once in `scaled`.

    Only the given rows of hidden have a gradient. A side that is not wanted is never computed.
    """

    def __init__(self, head: Head, kept: int, wanted: GradientRequest):
        self.head, self.wanted = head, wanted
        like = head.weight_UD
        self.hidden_nD = like.new_empty(kept, like.shape[1], dtype=head.dtype) if wanted.hidden else None
        self.weight_UD = None
        if wanted.weight:
            # The first chunk writes all of dW, unless it is filtered or there is none.
            new = torch.empty_like if kept and wanted.filter_eps == 0 else torch.zeros_like
            self.weight_UD = new(like, dtype=head.dtype) if wanted.main_grad_UD is None else wanted.main_grad_UD
        self.dropped_mass = like.new_zeros((), dtype=head.dtype)

    def add_(
        self, chunk: Resident, statistics: Statistics, d_logp_C: Tensor, d_entropy_C: Tensor | None = None
    ) -> None:
        """Overwrites the chunk's logits by their gradient and spends it on both matmuls."""
        if self.wanted:
            self.backward_matmuls_(chunk, self.dlogits_(chunk, statistics, d_logp_C, d_entropy_C))

    def backward_matmuls_(self, chunk: Resident, dz_CU: Tensor) -> None:
        weight_UD, d_weight_UD = self.head.weight_UD, self.weight_UD
        column_K = self._columns_that_matter(dz_CU)
        if column_K is not None:
            dz_CU, weight_UD = dz_CU.index_select(1, column_K), weight_UD.index_select(0, column_K)
            d_weight_UD = None if d_weight_UD is None else d_weight_UD.index_select(0, column_K)
        if self.hidden_nD is not None:
            matmuls.hidden_gradient_(self.hidden_nD[chunk.where], dz_CU, weight_UD)
        if d_weight_UD is not None:
            accumulate = self.weight_holds_something(chunk.where)
            matmuls.weight_gradient_(d_weight_UD, dz_CU, chunk.hidden_CD, accumulate=accumulate)
            if column_K is not None:
                self.weight_UD.index_copy_(0, column_K, d_weight_UD)

    def weight_holds_something(self, chunk: slice) -> bool:
        """Whether dW had a value before this chunk of the kept rows. (Zeros to add to would cost a walk through it.)"""
        return chunk.start > 0 or self.wanted.main_grad_UD is not None or self.wanted.filter_eps > 0

    def _columns_that_matter(self, dz_CU: Tensor) -> Tensor | None:
        """[K] the columns the two matmuls are restricted to, or None for all of them.

        Waits for the host: K is a shape. Above half of the columns the copies would cost more than they save.
        """
        if self.wanted.filter_eps == 0:
            return None
        mass_U = torch.linalg.vector_norm(dz_CU, ord=1, dim=0, dtype=self.head.dtype)
        dropped_U = mass_U < negligible_below(mass_U, self.wanted.filter_eps)
        column_K = (~dropped_U).nonzero()[:, 0]
        if len(column_K) > len(mass_U) // 2:
            return None
        self.dropped_mass += mass_U.where(dropped_U, 0.0).sum()
        return column_K

    def storage(self, chunk: Resident) -> Tensor:
        """Where the gradient of the chunk's logits belongs: over the logits, in the dtype the two matmuls take."""
        return dlogits_storage(chunk.z_CU, torch.bfloat16 if matmuls.tensor_core(chunk.hidden_CD) else chunk.z_CU.dtype)

    def dlogits_(
        self, chunk: Resident, statistics: Statistics, d_logp_C: Tensor, d_entropy_C: Tensor | None = None
    ) -> Tensor:
        head, z_CU, dz_CU = self.head, chunk.z_CU, self.storage(chunk)
        d_logp_C = d_logp_C / head.temperature
        d_entropy_C = None if d_entropy_C is None else d_entropy_C / head.temperature
        dlogits_ = row_functions(z_CU.device).dlogits_
        dlogits_(dz_CU, z_CU, head.local(chunk.target_C), head.shard.real, statistics, d_logp_C, d_entropy_C)
        return dz_CU

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dH of the kept rows, summed over ranks; dW of this rank's rows unless it went to `main_grad_UD`)."""
        if self.hidden_nD is not None:
            all_reduce_(self.hidden_nD, self.head.shard.group)
        if self.wanted.filter_eps > 0:
            all_reduce_(self.dropped_mass, self.head.shard.group)
        return self.hidden_nD, self.weight_UD if self.wanted.main_grad_UD is None else None


def negligible_below(mass_U: Tensor, eps: float) -> Tensor:
    """[] a threshold such that the columns below it hold at most eps of the mass together.

    The largest of eps · total · 2^−j that does. No sort, no scan: sums in a fixed order, so two runs are bit-equal. At
    j = log2 U the bound holds whatever the masses are, and the largest column always stays.
    """
    most = eps * mass_U.sum()
    threshold_J = most * 2.0 ** -torch.arange(len(mass_U).bit_length() + 1, device=mass_U.device, dtype=mass_U.dtype)
    below_J = torch.stack([mass_U.where(mass_U < threshold, 0.0).sum() for threshold in threshold_J])
    return threshold_J[(below_J > most).sum().clamp(max=len(threshold_J) - 1)]


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient · factor, rounded once."""
    if factor is None:
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def scatter_rows(rows_n: Tensor, gradient_nD: Tensor, tokens: int) -> Tensor:
    """Rows without a gradient are exactly zero."""
    return gradient_nD.new_zeros(tokens, gradient_nD.shape[1]).index_copy_(0, rows_n, gradient_nD)


@dataclass(frozen=True)
class OnePass:
    """What the backward of a one-pass loss needs beside its saved tensors: the gradients exist already."""

    tokens: int
    dtype: torch.dtype
    wanted: GradientRequest

    def backward(self, saved: tuple, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(d_hidden, d_weight) from (rows_n, dH of those rows, dW); only the upstream factor is missing."""
        rows_n, hidden_nD, weight_UD = saved
        if self.wanted.weight and self.wanted.main_grad_UD is not None:
            torch._assert_async(d_loss == 1, "weight_main_grad already holds dW: scale the weights, not the loss")
        # On a CPU looking at the factor costs nothing, and dW of a real head is too large to copy for nothing.
        factor = None if d_loss.device.type == "cpu" and d_loss == 1 else d_loss
        d_hidden_ND = d_weight_UD = None
        if hidden_nD is not None:
            d_hidden_ND = scatter_rows(rows_n, scaled(hidden_nD, factor, self.dtype), self.tokens)
        if weight_UD is not None:
            d_weight_UD = scaled(weight_UD, factor, self.dtype)
        return d_hidden_ND, d_weight_UD
