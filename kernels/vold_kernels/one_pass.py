"""Walks over chunks of tokens in which a loss reads the softmax and adds its gradient while the logits exist.

On a GPU a chunk's logits stay as they are until `dlogits_` overwrites them with their gradient. On a CPU every pass
over a chunk is bound by memory, so each tile is finished while it is in cache: logits, e^(x − max), their sums and
Σ e^(x − max) W, before the next tile is computed. The exponentials are kept, not the logits; dW multiplies them with a
factor per row, which is applied to hidden, the smaller operand:

    dL/dx = d_logp (1[x is the target] − e^(x − tile max) · e^(tile max − max) / sum)

Shape letters: N tokens, n kept tokens, C tokens of a chunk, D hidden, U vocabulary rows of this rank, B columns of a
tile, t tiles.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import matmuls, rows_torch
from .chunks import slices
from .head import Head, HeadGradients, ResidentChunk, finish_statistics, resident_chunks, stream_statistics
from .rows import uses_triton
from .softmax import SoftmaxStatistics
from .threads import in_threads, pieces
from .vocab import merge_tiles

Coefficients = tuple[Tensor, Tensor | None]
"""(d_logp, d_entropy) of Σ d_logp · logp + d_entropy · entropy; None for no second term."""
Loss = Callable[[slice, SoftmaxStatistics], Coefficients]
"""Called with positions among the kept rows and their softmax, for all kept rows in order."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that enter a loss."""

    hidden_ND: Tensor
    target_N: Tensor
    rows_n: Tensor
    """[n] int64, indices of the kept rows."""
    tokens: int
    """Of them in one chunk."""

    def chunks(self, head: Head) -> Iterator[ResidentChunk]:
        """The chunks, each in the buffer of the last but one where two lanes overlap."""
        batch = self.hidden_ND, self.target_N, self.rows_n
        return resident_chunks(head, *batch, tokens=self.tokens, buffers=head.lanes.buffers)


def one_pass(head: Head, rows: Rows, gradients: HeadGradients, loss: Loss) -> None:
    """Calls `loss` once per chunk and adds its gradient; logits are computed once (6NDV).

    One MAX and one SUM all-reduce per chunk: every rank takes the same steps.
    """
    # The filter needs the gradient of every column, the entropy's gradient needs the logits again.
    tiles_in_cache = gradients.request.filter_eps == 0 and not gradients.request.entropy
    if tiles_in_cache and not uses_triton(rows.hidden_ND.device):
        _one_pass_in_cache(head, rows, gradients, loss)
        return

    def rows_step(chunk: ResidentChunk) -> Tensor | None:
        folded_4C = head.empty_statistics(len(chunk.rows_C))
        head.fold_(folded_4C, chunk.z_CU, head.local_target(chunk.target_C), 0)
        statistics = finish_statistics(head, folded_4C, chunk.target_C)
        coefficients = loss(chunk.kept, statistics)
        return gradients.dlogits_(chunk, statistics, *coefficients) if gradients.request.any else None

    gradients.add_chunks_(rows.chunks(head), rows_step)


def two_passes(head: Head, rows: Rows, gradients: HeadGradients, loss: Loss) -> None:
    """Calls `loss` once, with all kept rows, for a loss that couples tokens of several chunks (8NDV).

    The logits are computed twice: tile by tile for the softmax, then `tokens` rows at a time for the gradient.
    """
    statistics = stream_statistics(head, rows.hidden_ND[rows.rows_n], rows.target_N[rows.rows_n])
    coefficients = loss(slice(0, len(rows.rows_n)), statistics)
    if gradients.request.any:
        second_pass(head, rows, gradients, statistics, coefficients)


def second_pass(
    head: Head, rows: Rows, gradients: HeadGradients, statistics: SoftmaxStatistics, coefficients: Coefficients
) -> None:
    """Computes the logits of the kept rows and adds their gradient; statistics and coefficients are given, [n] each."""
    d_logp_n, d_entropy_n = coefficients

    def rows_step(chunk: ResidentChunk) -> Tensor:
        d_entropy_C = None if d_entropy_n is None else d_entropy_n[chunk.kept]
        return gradients.dlogits_(chunk, statistics.select(chunk.kept), d_logp_n[chunk.kept], d_entropy_C)

    gradients.add_chunks_(rows.chunks(head), rows_step)


@dataclass(frozen=True)
class _Exponentials:
    """A chunk of tokens after all tiles."""

    hidden_CD: Tensor
    local_target_C: Tensor
    exp_CU: Tensor
    """e^(x − max of the tile), exactly 0 in padding."""
    max_tC: Tensor
    """The running maximum up to each tile, to which its exponentials are relative."""
    exp_weight_CD: Tensor
    """Σ e^(x − max of the last tile) W over this rank's rows; 0 where dH is not requested."""


def _one_pass_in_cache(head: Head, rows: Rows, gradients: HeadGradients, loss: Loss) -> None:
    """`one_pass` with each tile finished while it is in cache (CPU only). Each thread has tokens of its own."""
    columns, needs_hidden_gradient = head.shard.rows, gradients.request.hidden
    exp_buffer = head.buffer(min(rows.tokens, len(rows.rows_n)), columns)
    for kept in slices(len(rows.rows_n), rows.tokens):
        rows_C = rows.rows_n[kept]
        hidden_CD, target_C = rows.hidden_ND.index_select(0, rows_C).to(head.dtype), rows.target_N[rows_C]
        exp_CU = head.view(exp_buffer, len(hidden_CD), columns)
        chunk, folded_4C = _exponentials(head, exp_CU, (hidden_CD, target_C), needs_hidden_gradient)
        statistics = finish_statistics(head, folded_4C, target_C)
        d_logp_C, _ = loss(kept, statistics)
        _add_gradient(head, gradients, chunk, statistics, (kept, d_logp_C))


def _exponentials(
    head: Head, exp_CU: Tensor, inputs: tuple[Tensor, Tensor], needs_hidden_gradient: bool
) -> tuple[_Exponentials, Tensor]:
    """(the chunk, [4, C] its running statistics over this rank's rows). inputs: (hidden_CD, target_C)."""
    hidden_CD, target_C = inputs
    local_target_C, exp_weight_CD = head.local_target(target_C), torch.zeros_like(hidden_CD)

    def exponentials(part: slice) -> Tensor:
        exp_weight_cD = exp_weight_CD[part] if needs_hidden_gradient else None
        return _exponentials_(exp_CU[part], exp_weight_cD, head, (hidden_CD[part], local_target_C[part]))

    folded_4tC = torch.cat(in_threads(exponentials, pieces(target_C, head.shard.rows, step=16)), dim=2)
    chunk = _Exponentials(hidden_CD, local_target_C, exp_CU, folded_4tC[0], exp_weight_CD)
    return chunk, merge_tiles(folded_4tC)


def _exponentials_(exp_CU: Tensor, exp_weight_CD: Tensor | None, head: Head, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """[4, t, C] the running statistics of each tile of this rank's rows. Writes the fields of `_Exponentials`.

    inputs: (hidden_CD, local_target_C).
    """
    hidden_CD, local_target_C = inputs
    tokens, rows = exp_CU.shape
    column_C, is_local_C = rows_torch.target_column(local_target_C, rows, head.shard.real_rows, 0)
    target_tile_C = column_C.div(rows_torch.BLOCK, rounding_mode="floor").where(is_local_C, -1)
    column_in_tile_C1 = column_C[:, None] % rows_torch.BLOCK
    columns = min(rows, rows_torch.BLOCK)
    buffer = head.buffer(tokens, columns)
    tile_CB = head.view(buffer, tokens, columns)
    max_C, folded = head.empty_statistics(tokens)[0], []
    for index, tile in enumerate(slices(rows, rows_torch.BLOCK)):
        weight_BD, exp_CB, previous_max_C = head.weight_UD[tile].to(head.dtype), exp_CU[:, tile], max_C
        z_CB = head.logits(buffer, hidden_CD, weight_BD)
        target_logit_C = tile_CB.gather(1, column_in_tile_C1)[:, 0].where(target_tile_C == index, 0.0)
        max_C, *sums = rows_torch.exponentiate_(exp_CB, z_CB, max_C, head.shard.real_rows, tile.start)
        folded.append(torch.stack((max_C, *sums, target_logit_C)))
        if exp_weight_CD is not None:
            exp_weight_CD *= (previous_max_C - max_C).exp()[:, None]
            matmuls.hidden_gradient_(exp_weight_CD, exp_CB, weight_BD, accumulate=True)
    return torch.stack(folded, dim=1)


def _add_gradient(
    head: Head,
    gradients: HeadGradients,
    chunk: _Exponentials,
    statistics: SoftmaxStatistics,
    coefficients: tuple[slice, Tensor],
) -> None:
    """Adds dH and dW. In a tile dL/dx is −factor · e^(x − tile max), plus d_logp at the target; it is never stored.

    coefficients: (positions among the kept rows, d_logp_C).
    """
    kept, d_logp_C = coefficients
    d_logp_C = d_logp_C / head.temperature
    column_C, is_local_C = rows_torch.target_column(chunk.local_target_C, head.shard.rows, head.shard.real_rows, 0)
    d_target_C = torch.where(is_local_C, d_logp_C, 0.0)
    factor_tC = d_logp_C * (chunk.max_tC - statistics.max_C - statistics.log_sum_C).exp()
    if gradients.hidden_nD is not None:
        softmax_part_CD = chunk.exp_weight_CD * factor_tC[-1, :, None]
        d_hidden_CD = gradients.hidden_nD[kept]
        torch.addcmul(-softmax_part_CD, head.weight_UD[column_C], d_target_C[:, None], out=d_hidden_CD)
    if gradients.weight_UD is not None:
        accumulate, d_weight_UD = gradients.weight_is_initialised(kept), gradients.weight_UD

        def add_rows(part: slice) -> None:
            for tile in slices(part.stop, rows_torch.BLOCK, first=part.start):
                scaled_hidden_CD = chunk.hidden_CD * -factor_tC[tile.start // rows_torch.BLOCK, :, None]
                exp_CB = chunk.exp_CU[:, tile]
                matmuls.weight_gradient_(d_weight_UD[tile], exp_CB, scaled_hidden_CD, accumulate=accumulate)

        in_threads(add_rows, pieces(d_weight_UD, len(d_logp_C), dim=0, step=rows_torch.BLOCK))
        gradients.weight_UD.index_add_(0, column_C, chunk.hidden_CD * d_target_C[:, None])
