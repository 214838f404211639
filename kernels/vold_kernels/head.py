"""A language-model head, one chunk of tokens at a time: logits, statistics, gradients. Every loss is a loop over these.

Shape letters: N tokens, n tokens that are kept (those with a weight or a gradient), C tokens of a chunk, D hidden,
U vocabulary rows of this rank, B columns of one tile, K columns that the filter keeps.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import matmuls, waves
from .chunks import ChunkBudget, slices
from .lanes import Done, Lanes, free_bytes, lanes_of, processors
from .rows import row_functions, uses_triton
from .softmax import SoftmaxStatistics, dlogits_storage, empty_statistics
from .threads import in_threads, pieces
from .vocab import VocabShard, all_reduce_, merge


@dataclass(frozen=True)
class Head:
    """This rank's rows of a head, and how its logits are computed."""

    weight_UD: Tensor
    shard: VocabShard
    temperature: float
    budget: ChunkBudget

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics and gradients."""
        return matmuls.accumulator_dtype(self.weight_UD.dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype in which logits are stored: `dtype`, or bf16 where the budget asks for it on a GPU."""
        in_bf16 = self.budget.bf16_logits and matmuls.uses_tensor_cores(self.weight_UD)
        return torch.bfloat16 if in_bf16 else self.dtype

    @property
    def lanes(self) -> Lanes:
        """The lanes of matmuls and row kernels."""
        return lanes_of(self.weight_UD.device, overlap=self.budget.overlap)

    def resident_tokens(self, rows: int, tokens: int, *, buffers: int | None = None) -> int:
        """Tokens of each resident chunk of `rows` columns: by whole waves on a GPU (`waves.py`), else as
        `ChunkBudget.resident_tokens` says. buffers: chunks at once, by default one a lane."""
        buffers, budget = buffers or self.lanes.buffers, self.budget
        itemsize, sms = self.logits_dtype.itemsize, processors(self.weight_UD.device)
        if sms:
            wanted, is_alone = budget.resident_bytes, len(self.shard.sizes_R) == 1
            all_bytes = (
                waves.bytes_within(wanted, free_bytes(self.weight_UD.device))
                if is_alone
                else waves.shared_bytes(wanted)
            )
            most = all_bytes // (buffers * rows * itemsize)
            shape = waves.HeadShape(tokens, self.weight_UD.shape[1], rows)
            if chosen := waves.resident_tokens(shape, min(most, budget.max_tokens), sms):
                return chosen
        return replace(budget, resident_bytes=budget.resident_bytes // buffers).resident_tokens(rows, itemsize, tokens)

    def tile(self, tokens: int) -> tuple[int, int]:
        """(tokens, columns) of a tile, likewise."""
        budget, rows, itemsize = self.budget, self.shard.rows, self.logits_dtype.itemsize
        tile_bytes, device = budget.tile_bytes // self.lanes.buffers, self.weight_UD.device
        if sms := processors(device):
            tile_bytes = waves.bytes_within(budget.tile_bytes, free_bytes(device)) // self.lanes.buffers
            shape = waves.HeadShape(tokens, self.weight_UD.shape[1], rows)
            if chosen := waves.tile(shape, tile_bytes // itemsize, (budget.max_tokens, budget.tile_columns), sms):
                return chosen
        return replace(budget, tile_bytes=tile_bytes).tile(rows, itemsize)

    def buffer(self, tokens: int, columns: int) -> Tensor:
        """Flat memory for [tokens, columns] logits, used again for every chunk."""
        return torch.empty(tokens * columns, dtype=self.logits_dtype, device=self.weight_UD.device)

    def view(self, buffer: Tensor, tokens: int, columns: int) -> Tensor:
        """[tokens, columns] in the buffer. On a CPU the tokens of one vocabulary row lie together: a tile is then
        contiguous, and the matmul into it up to a third faster."""
        part = buffer[: tokens * columns]
        return part.view(tokens, columns) if uses_triton(buffer.device) else part.view(columns, tokens).t()

    def logits(self, buffer: Tensor, hidden_CD: Tensor, weight_BD: Tensor) -> Tensor:
        """[C, B] logits after temperature, in the buffer."""
        z_CB = self.view(buffer, len(hidden_CD), len(weight_BD))
        matmuls.logits_(z_CB, hidden_CD, weight_BD, temperature=self.temperature)
        if self.budget.bf16_logits and z_CB.dtype != torch.bfloat16:
            z_CB.copy_(z_CB.bfloat16())
        return z_CB

    def local_target(self, target_N: Tensor) -> Tensor:
        """[N] target ids counted from this rank's first row. Those of other ranks lie outside its rows."""
        return target_N.long() - self.shard.offset

    def empty_statistics(self, tokens: int) -> Tensor:
        """[4, tokens] running statistics of no columns."""
        return empty_statistics(tokens, self.weight_UD, self.dtype)

    def fold_(self, folded_4C: Tensor, z_CB: Tensor, local_target_C: Tensor, first: int) -> None:
        """Updates running statistics with a tile of logits whose first column is the rank's row `first`."""
        row_functions(z_CB.device).fold_(folded_4C, z_CB, local_target_C, self.shard.real_rows, first)


def finish_statistics(head: Head, folded_4N: Tensor, target_N: Tensor) -> SoftmaxStatistics:
    """The softmax over all ranks, from the running statistics over this rank's rows."""
    max_N, sum_N, gap_sum_N, target_logit_N = merge(folded_4N, head.shard.group)
    log_sum_N = sum_N.log()
    is_real_N = (target_N >= 0) & (target_N < head.shard.vocab_size)
    logp_N = torch.where(is_real_N, (target_logit_N - max_N) - log_sum_N, float("nan"))
    return SoftmaxStatistics(max_N, log_sum_N, logp_N, log_sum_N - gap_sum_N / sum_N)


def stream_statistics(head: Head, hidden_ND: Tensor, target_N: Tensor) -> SoftmaxStatistics:
    """Statistics of every token, from tiles of logits in reused buffers (one a lane; on a CPU one a thread). Ranks
    communicate once, at the end."""
    tokens, columns = head.tile(len(target_N))
    folded_4N = head.empty_statistics(len(target_N))
    local_target_N = head.local_target(target_N)

    def fold(part: slice) -> None:
        lanes, running = head.lanes, deque[Done]()
        buffers = [head.buffer(min(tokens, part.stop - part.start), columns) for _ in range(lanes.buffers)]
        tiles = ((c, t) for c in slices(part.stop, tokens, first=part.start) for t in slices(head.shard.rows, columns))
        for index, (chunk, tile) in enumerate(tiles):
            if len(running) == len(buffers):
                lanes.wait(running.popleft())
            z_CB = head.logits(buffers[index % len(buffers)], hidden_ND[chunk], head.weight_UD[tile])
            with lanes.rows() as done:
                head.fold_(folded_4N[:, chunk], z_CB, local_target_N[chunk], tile.start)
            running.append(done)
        if running:
            lanes.wait(running[-1])

    is_one_part = uses_triton(hidden_ND.device)
    in_threads(fold, [slice(0, len(target_N))] if is_one_part else pieces(folded_4N, head.shard.rows, step=16))
    return finish_statistics(head, folded_4N, target_N)


@dataclass(frozen=True)
class ResidentChunk:
    """All of this rank's logits of some kept rows, in memory until their gradient has overwritten them."""

    kept: slice
    """Positions of the chunk among the n kept rows."""
    rows_C: Tensor
    """[C] int64, indices of the chunk's rows in hidden."""
    hidden_CD: Tensor
    target_C: Tensor
    """[C] global ids."""
    z_CU: Tensor
    """[C, U] logits after temperature."""


def resident_chunks(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, *, tokens: int, buffers: int = 1
) -> Iterator[ResidentChunk]:
    """The given rows of hidden, `tokens` at a time. Each chunk overwrites the logits of the one `buffers` before."""
    buffers = min(buffers, -(-len(rows_n) // tokens))
    memory = [head.buffer(min(tokens, len(rows_n)), head.shard.rows) for _ in range(buffers)]
    for index, kept in enumerate(slices(len(rows_n), tokens)):
        rows_C = rows_n[kept]
        hidden_CD = hidden_ND.index_select(0, rows_C)
        z_CU = head.logits(memory[index % buffers], hidden_CD, head.weight_UD)
        yield ResidentChunk(kept, rows_C, hidden_CD, target_N[rows_C], z_CU)


@dataclass(frozen=True)
class GradientRequest:
    """The gradients of a head to compute, and how."""

    hidden: bool
    """Compute dH."""
    weight: bool
    """Compute dW."""
    main_grad_UD: Tensor | None = None
    """Buffer to which dW is added, instead of being returned."""
    filter_eps: float = 0.0
    """Share of a chunk's Σ|dlogits| that may be left out; 0 is exact."""
    entropy: bool = False
    """The loss depends on the entropy too."""

    @property
    def any(self) -> bool:
        """True where dH or dW is computed."""
        return self.hidden or self.weight


def needs_gradient(tensor: Tensor) -> bool:
    """True where autograd records operations on this tensor now."""
    return torch.is_grad_enabled() and tensor.requires_grad


RowsStep = Callable[[ResidentChunk], Tensor | None]
"""[C, U] gradient of a chunk's logits, written over them, or None where none is requested."""


class HeadGradients:
    """dH and dW over all chunks, accumulated in fp32 (fp64 for fp64) and rounded once, in `scaled`.

    hidden_nD: [n, D] dH of the kept rows, or None. weight_UD: [U, D] dW, or None. A side that is not requested is never
    computed.
    """

    def __init__(self, head: Head, kept_rows: int, request: GradientRequest):
        self.head, self.request = head, request
        weight_UD = head.weight_UD
        self.hidden_nD: Tensor | None = None
        self.weight_UD: Tensor | None = None
        if request.hidden:
            self.hidden_nD = weight_UD.new_empty(kept_rows, weight_UD.shape[1], dtype=head.dtype)
        if request.weight:
            # The first chunk writes all of dW, unless it is filtered or there is none.
            new = torch.empty_like if kept_rows and request.filter_eps == 0 else torch.zeros_like
            main_grad_UD = request.main_grad_UD
            self.weight_UD = new(weight_UD, dtype=head.dtype) if main_grad_UD is None else main_grad_UD
        self.dropped_mass = weight_UD.new_zeros((), dtype=head.dtype)

    def add_chunks_(self, chunks: Iterator[ResidentChunk], rows_step: RowsStep) -> None:
        """Adds the gradients of all chunks. rows_step(chunk), in the row lane, returns what `dlogits_` does; the two
        matmuls follow when the row lane is done, in a second lane under the row kernels of the next chunk."""
        lanes, running = self.head.lanes, deque[tuple[ResidentChunk, Tensor | None, Done]]()

        def finish_first() -> None:
            chunk, dz_CU, done = running.popleft()
            lanes.wait(done)
            if dz_CU is not None:
                self.backward_matmuls_(chunk, dz_CU)

        for chunk in chunks:
            with lanes.rows() as done:
                dz_CU = rows_step(chunk)
            running.append((chunk, dz_CU, done))
            if len(running) == lanes.buffers:
                finish_first()
        while running:
            finish_first()

    def dlogits_(
        self, chunk: ResidentChunk, statistics: SoftmaxStatistics, d_logp_C: Tensor, d_entropy_C: Tensor | None = None
    ) -> Tensor:
        """[C, U] the same gradient with respect to hidden weightᵀ, written over the chunk's logits."""
        head, z_CU, dz_CU = self.head, chunk.z_CU, self.storage(chunk)
        d_logp_C = d_logp_C / head.temperature
        d_entropy_C = None if d_entropy_C is None else d_entropy_C / head.temperature
        local_target_C, real_rows = head.local_target(chunk.target_C), head.shard.real_rows
        dlogits_ = row_functions(z_CU.device).dlogits_
        dlogits_(dz_CU, z_CU, local_target_C, real_rows, statistics, d_logp_C, d_entropy_C)
        return dz_CU

    def storage(self, chunk: ResidentChunk) -> Tensor:
        """[C, U] view of the chunk's logits, in the dtype that the two matmuls take, for their gradient."""
        in_bf16 = matmuls.uses_tensor_cores(chunk.hidden_CD)
        return dlogits_storage(chunk.z_CU, torch.bfloat16 if in_bf16 else chunk.z_CU.dtype)

    def backward_matmuls_(self, chunk: ResidentChunk, dz_CU: Tensor) -> None:
        """Computes the chunk's dH = dz W and adds its dzᵀ H to dW, over the columns that the filter keeps."""
        weight_UD, d_weight_UD = self.head.weight_UD, self.weight_UD
        column_K = self._kept_columns(dz_CU)
        if column_K is not None:
            dz_CU, weight_UD = dz_CU.index_select(1, column_K), weight_UD.index_select(0, column_K)
            d_weight_UD = None if d_weight_UD is None else d_weight_UD.index_select(0, column_K)
        if self.hidden_nD is not None:
            matmuls.hidden_gradient_(self.hidden_nD[chunk.kept], dz_CU, weight_UD)
        if self.weight_UD is not None and d_weight_UD is not None:
            accumulate = self.weight_is_initialised(chunk.kept)
            matmuls.weight_gradient_(d_weight_UD, dz_CU, chunk.hidden_CD, accumulate=accumulate)
            if column_K is not None:
                self.weight_UD.index_copy_(0, column_K, d_weight_UD)

    def weight_is_initialised(self, kept: slice) -> bool:
        """True where dW has a value before this chunk. (Starting from zeros would cost a pass through its memory.)"""
        return kept.start > 0 or self.request.main_grad_UD is not None or self.request.filter_eps > 0

    def _kept_columns(self, dz_CU: Tensor) -> Tensor | None:
        """[K] int64, the columns that hold all but filter_eps of Σ|dz|, or None for all columns.

        The host waits, since K is a shape. Above half of the columns the copies would cost more than they save.
        """
        if self.request.filter_eps == 0:
            return None
        mass_U = torch.linalg.vector_norm(dz_CU, ord=1, dim=0, dtype=self.head.dtype)
        dropped_U = mass_U < filter_threshold(mass_U, self.request.filter_eps)
        column_K = (~dropped_U).nonzero()[:, 0]
        if len(column_K) > len(mass_U) // 2:
            return None
        self.dropped_mass += mass_U.where(dropped_U, 0.0).sum()
        return column_K

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dH of the kept rows, summed over ranks; dW of this rank's rows unless it went to `main_grad_UD`)."""
        if self.hidden_nD is not None:
            all_reduce_(self.hidden_nD, self.head.shard.group)
        if self.request.filter_eps > 0:
            all_reduce_(self.dropped_mass, self.head.shard.group)
        return self.hidden_nD, self.weight_UD if self.request.main_grad_UD is None else None


def filter_threshold(mass_U: Tensor, eps: float) -> Tensor:
    """[] a threshold such that the columns below it hold at most eps of the total mass.

    The largest of eps · total · 2^−j that does. Without a sort or a scan, sums are in a fixed order and two runs are
    bit-equal. At j = log2 U the bound holds for any masses, and the largest column is always kept.
    """
    allowed_mass = eps * mass_U.sum()
    power_J = torch.arange(len(mass_U).bit_length() + 1, device=mass_U.device, dtype=mass_U.dtype)
    threshold_J = allowed_mass * 2.0**-power_J
    below_J = torch.stack([mass_U.where(mass_U < threshold, 0.0).sum() for threshold in threshold_J])
    return threshold_J[(below_J > allowed_mass).sum().clamp(max=len(threshold_J) - 1)]


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient · factor in `dtype`, rounded once. None: factor 1."""
    if factor is None:
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def scatter_rows(rows_n: Tensor, gradient_nD: Tensor, tokens: int) -> Tensor:
    """[tokens, D] with the gradient at the given rows and exactly 0 at all others."""
    return gradient_nD.new_zeros(tokens, gradient_nD.shape[1]).index_copy_(0, rows_n, gradient_nD)


@dataclass(frozen=True)
class OnePassBackward:
    """Backward of a one-pass loss: its forward formed the gradients, only the upstream factor is missing."""

    tokens: int
    dtype: torch.dtype
    request: GradientRequest

    def __call__(self, saved: tuple, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(dH [N, D], dW [U, D]) from saved = (rows_n, dH of those rows, dW)."""
        rows_n, hidden_nD, weight_UD = saved
        if self.request.weight and self.request.main_grad_UD is not None:
            # torch has no public assertion that runs on the device.
            assert_async = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
            assert_async(d_loss == 1, "weight_main_grad already holds dW: scale the weights, not the loss")
        # Reading the factor costs nothing on a CPU, and multiplying dW of a real head by 1 would cost a copy.
        factor = None if d_loss.device.type == "cpu" and d_loss == 1 else d_loss
        d_hidden_ND = d_weight_UD = None
        if hidden_nD is not None:
            d_hidden_ND = scatter_rows(rows_n, scaled(hidden_nD, factor, self.dtype), self.tokens)
        if weight_UD is not None:
            d_weight_UD = scaled(weight_UD, factor, self.dtype)
        return d_hidden_ND, d_weight_UD
