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
from functools import partial

import torch
from torch import Tensor

from . import matmuls, rows_torch
from .chunks import slices
from .head import Head, HeadGradients, finish_statistics, resident_chunks, stream_statistics
from .rows import uses_triton
from .softmax import SoftmaxStatistics
from .threads import in_threads, pieces
from .vocab import merge_tiles

AddGradient = Callable[..., None]
"""Adds the gradient of Σ d_logp · logp (+ d_entropy · entropy): called with d_logp_C, and with d_entropy_C where
`GradientRequest.entropy`."""
Step = tuple[slice, SoftmaxStatistics, AddGradient]
"""(positions among the kept rows, their softmax, how to add their gradient)"""


def one_pass(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, *, tokens: int
) -> Iterator[Step]:
    """One step per chunk of `tokens` of the given rows; logits are computed once (6NDV).

    Each chunk overwrites the one before, so its gradient is added before the next step. One MAX and one SUM all-reduce
    per chunk: every rank takes the same steps.
    """
    # The filter needs the gradient of every column, the entropy's gradient needs the logits again.
    tiles_in_cache = gradients.request.filter_eps == 0 and not gradients.request.entropy
    if tiles_in_cache and not uses_triton(hidden_ND.device):
        yield from _one_pass_in_cache(head, hidden_ND, target_N, rows_n, gradients, tokens)
        return
    for chunk in resident_chunks(head, hidden_ND, target_N, rows_n, tokens=tokens):
        folded_4C = head.empty_statistics(len(chunk.rows_C))
        head.fold_(folded_4C, chunk.z_CU, head.local_target(chunk.target_C), 0)
        statistics = finish_statistics(head, folded_4C, chunk.target_C)
        yield chunk.kept, statistics, partial(gradients.add_chunk_, chunk, statistics)


def two_passes(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, *, tokens: int
) -> Iterator[Step]:
    """A single step with all given rows, for a loss that couples tokens of several chunks (8NDV).

    The logits are computed twice: tile by tile for the softmax, then `tokens` rows at a time for the gradient.
    """
    statistics = stream_statistics(head, hidden_ND[rows_n], target_N[rows_n])

    def add_gradient(d_logp_n: Tensor, d_entropy_n: Tensor | None = None) -> None:
        if not gradients.request.any:
            return
        for chunk in resident_chunks(head, hidden_ND, target_N, rows_n, tokens=tokens):
            d_entropy_C = None if d_entropy_n is None else d_entropy_n[chunk.kept]
            gradients.add_chunk_(chunk, statistics.select(chunk.kept), d_logp_n[chunk.kept], d_entropy_C)

    yield slice(0, len(rows_n)), statistics, add_gradient


@dataclass(frozen=True)
class _Exponentials:
    """A chunk of tokens after all tiles."""

    kept: slice
    """Positions of the chunk among the n kept rows."""
    hidden_CD: Tensor
    local_target_C: Tensor
    exp_CU: Tensor
    """e^(x − max of the tile), exactly 0 in padding."""
    max_tC: Tensor
    """The running maximum up to each tile, to which its exponentials are relative."""
    exp_weight_CD: Tensor
    """Σ e^(x − max of the last tile) W over this rank's rows; 0 where dH is not requested."""


def _one_pass_in_cache(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, tokens: int
) -> Iterator[Step]:
    """`one_pass` with each tile finished while it is in cache (CPU only). Each thread has tokens of its own."""
    rows = head.shard.rows
    exp_buffer = head.buffer(min(tokens, len(rows_n)), rows)
    for kept in slices(len(rows_n), tokens):
        hidden_CD = hidden_ND.index_select(0, rows_n[kept]).to(head.dtype)
        target_C = target_N[rows_n[kept]]
        local_target_C = head.local_target(target_C)
        exp_CU, exp_weight_CD = head.view(exp_buffer, len(hidden_CD), rows), torch.zeros_like(hidden_CD)

        def exponentials(piece: slice) -> Tensor:
            inputs = hidden_CD[piece], local_target_C[piece]  # noqa: B023 (called in this iteration)
            exp_weight = exp_weight_CD[piece] if gradients.request.hidden else None  # noqa: B023
            return _exponentials_(exp_CU[piece], exp_weight, head, inputs)  # noqa: B023

        folded_4tC = torch.cat(in_threads(exponentials, pieces(target_C, rows, step=16)), dim=2)
        statistics = finish_statistics(head, merge_tiles(folded_4tC), target_C)
        chunk = _Exponentials(kept, hidden_CD, local_target_C, exp_CU, folded_4tC[0], exp_weight_CD)
        yield kept, statistics, partial(_add_gradient, head, gradients, chunk, statistics)


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
    head: Head, gradients: HeadGradients, chunk: _Exponentials, statistics: SoftmaxStatistics, d_logp_C: Tensor
) -> None:
    """Adds dH and dW. In a tile dL/dx is −factor · e^(x − tile max), plus d_logp at the target; it is never stored."""
    d_logp_C = d_logp_C / head.temperature
    column_C, is_local_C = rows_torch.target_column(chunk.local_target_C, head.shard.rows, head.shard.real_rows, 0)
    d_target_C = torch.where(is_local_C, d_logp_C, 0.0)
    factor_tC = d_logp_C * (chunk.max_tC - statistics.max_C - statistics.log_sum_C).exp()
    if gradients.hidden_nD is not None:
        softmax_part_CD = chunk.exp_weight_CD * factor_tC[-1, :, None]
        d_hidden_CD = gradients.hidden_nD[chunk.kept]
        torch.addcmul(-softmax_part_CD, head.weight_UD[column_C], d_target_C[:, None], out=d_hidden_CD)
    if gradients.weight_UD is not None:
        accumulate, d_weight_UD = gradients.weight_is_initialised(chunk.kept), gradients.weight_UD

        def add_rows(part: slice) -> None:
            for tile in slices(part.stop, rows_torch.BLOCK, first=part.start):
                scaled_hidden_CD = chunk.hidden_CD * -factor_tC[tile.start // rows_torch.BLOCK, :, None]
                exp_CB = chunk.exp_CU[:, tile]
                matmuls.weight_gradient_(d_weight_UD[tile], exp_CB, scaled_hidden_CD, accumulate=accumulate)

        in_threads(add_rows, pieces(d_weight_UD, len(d_logp_C), dim=0, step=rows_torch.BLOCK))
        gradients.weight_UD.index_add_(0, column_C, chunk.hidden_CD * d_target_C[:, None])
