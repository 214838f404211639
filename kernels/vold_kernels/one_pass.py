"""Chunk by chunk: the softmax of the given rows, then the gradient of what was decided from it, logits made once.

On a GPU a chunk's logits stay as they are until `dlogits_` writes their gradient over them. On a CPU each pass over a
chunk is a walk through memory, so a tile is finished while it is in cache: logits, e^(x − top), their sums and their
share of Σ e^(x − top) W, before the next tile is touched. What is kept are the exponentials; dW then takes them with
the factor of their row on the hidden side, where it costs nothing:

    dL/dx = d_logp (1[x is the target] − e^(x − tile top) · e^(tile top − top) / total)

Shape letters: N tokens, C tokens of a chunk, D hidden, U vocabulary rows of this rank, B columns of a tile, t tiles.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import matmuls, rows_torch
from .chunks import slices
from .head import Head, HeadGradients, finish, resident_chunks, stream
from .rows import Statistics, row_functions
from .vocab import merge_tiles

AddGradient = Callable[..., None]
"""(d_logp_C, d_entropy_C where `Wanted.entropy`)"""


def one_pass(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, *, tokens: int
) -> Iterator[tuple[slice, Statistics, AddGradient]]:
    """For each chunk of the given rows: which of them, their softmax, and how to add the gradient of Σ d_logp · logp.

    Each chunk overwrites the one before, so its gradient is added before the next is asked for. One MAX and one SUM
    all-reduce a chunk: every rank must be at the same one.
    """
    # The filter looks at columns of the gradient itself, the entropy's gradient needs the logits again.
    in_cache = gradients.wanted.filter_eps == 0 and not gradients.wanted.entropy
    if in_cache and row_functions(hidden_ND.device) is rows_torch:
        yield from _in_cache(head, hidden_ND, target_N, rows_n, gradients, tokens)
        return
    for chunk in resident_chunks(head, hidden_ND, target_N, rows_n, tokens=tokens):
        folded_4C = head.new_statistics(len(chunk.rows_C))
        head.fold_(folded_4C, chunk.z_CU, head.local(chunk.target_C), 0)
        statistics = finish(head, folded_4C, chunk.target_C)
        yield chunk.where, statistics, partial(gradients.add_, chunk, statistics)


def two_passes(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, *, tokens: int
) -> Iterator[tuple[slice, Statistics, AddGradient]]:
    """The same for a loss whose derivative at a token depends on other tokens, where they do not fit into one chunk:
    all rows at once, and their logits made a second time, `tokens` rows after another, for the gradient (8NHV)."""
    statistics = stream(head, hidden_ND[rows_n], target_N[rows_n])

    def add_gradient(d_logp_n: Tensor, d_entropy_n: Tensor | None = None) -> None:
        if not gradients.wanted:
            return
        for chunk in resident_chunks(head, hidden_ND, target_N, rows_n, tokens=tokens):
            d_entropy_C = None if d_entropy_n is None else d_entropy_n[chunk.where]
            gradients.add_(chunk, statistics.rows(chunk.where), d_logp_n[chunk.where], d_entropy_C)

    yield slice(0, len(rows_n)), statistics, add_gradient


@dataclass(frozen=True)
class _Exponentials:
    """A chunk after its walk through the tiles."""

    where: slice
    hidden_CD: Tensor
    local_target_C: Tensor
    mass_CU: Tensor
    """e^(x − top of the tile), exactly 0 in padding."""
    top_tC: Tensor
    """The running maximum that each tile was taken against."""
    pull_CD: Tensor
    """Σ e^(x − the last of them) W."""


def _in_cache(
    head: Head, hidden_ND: Tensor, target_N: Tensor, rows_n: Tensor, gradients: HeadGradients, tokens: int
) -> Iterator[tuple[slice, Statistics, AddGradient]]:
    most = min(tokens, len(rows_n))
    buffer, scratch = (head.buffer(most, size) for size in (head.shard.rows, min(head.shard.rows, rows_torch.BLOCK)))
    for where in slices(len(rows_n), tokens):
        hidden_CD = hidden_ND.index_select(0, rows_n[where]).to(head.dtype)
        target_C = target_N[rows_n[where]]
        chunk, folded_4C = _exponentials(head, buffer, scratch, where, hidden_CD, target_C, gradients)
        statistics = finish(head, folded_4C, target_C)
        yield where, statistics, partial(_add_gradient, head, gradients, chunk, statistics)


def _exponentials(
    head: Head,
    buffer: Tensor,
    scratch: Tensor,
    where: slice,
    hidden_CD: Tensor,
    target_C: Tensor,
    gradients: HeadGradients,
) -> tuple[_Exponentials, Tensor]:
    """The chunk, and its statistics over this rank's rows [4, C]."""
    tokens, rows = len(hidden_CD), head.shard.rows
    local_target_C = head.local(target_C)
    column_C, owned_C = rows_torch.target_column(local_target_C, rows, head.shard.real, 0)
    tile_C = column_C.div(rows_torch.BLOCK, rounding_mode="floor").where(owned_C, -1)
    within_C1 = column_C[:, None] % rows_torch.BLOCK
    mass_CU, whole_CB = head.view(buffer, tokens, rows), head.view(scratch, tokens, min(rows, rows_torch.BLOCK))
    top_C, pull_CD, folded = head.new_statistics(tokens)[0], torch.zeros_like(hidden_CD), []
    for index, tile in enumerate(slices(rows, rows_torch.BLOCK)):
        weight_BD, mass_CB, before_C = head.weight_UD[tile].to(head.dtype), mass_CU[:, tile], top_C
        z_CB = head.logits(scratch, hidden_CD, weight_BD)
        target_logit_C = whole_CB.gather(1, within_C1)[:, 0].where(tile_C == index, 0.0)
        top_C, *sums = rows_torch.exponentiate_(mass_CB, z_CB, top_C, head.shard.real, tile.start)
        folded.append(torch.stack((top_C, *sums, target_logit_C)))
        if gradients.wanted.hidden:
            pull_CD *= (before_C - top_C).exp()[:, None]
            matmuls.hidden_gradient_(pull_CD, mass_CB, weight_BD, accumulate=True)
    folded_4tC = torch.stack(folded, dim=1)
    return _Exponentials(where, hidden_CD, local_target_C, mass_CU, folded_4tC[0], pull_CD), merge_tiles(folded_4tC)


def _add_gradient(
    head: Head, gradients: HeadGradients, chunk: _Exponentials, statistics: Statistics, d_logp_C: Tensor
) -> None:
    """dL/dx of the chunk is −share · e^(x − tile top) in a tile, plus d_logp at the target; never written down."""
    d_logp_C = d_logp_C / head.temperature
    column_C, owned_C = rows_torch.target_column(chunk.local_target_C, head.shard.rows, head.shard.real, 0)
    d_target_C = torch.where(owned_C, d_logp_C, 0.0)
    share_tC = d_logp_C * (chunk.top_tC - statistics.top_C - statistics.log_total_C).exp()
    if gradients.hidden_nD is not None:
        pulled_CD = chunk.pull_CD * share_tC[-1, :, None]
        torch.addcmul(-pulled_CD, head.weight_UD[column_C], d_target_C[:, None], out=gradients.hidden_nD[chunk.where])
    if gradients.weight_UD is not None:
        accumulate = gradients.weight_holds_something(chunk.where)
        for tile, share_C in zip(slices(head.shard.rows, rows_torch.BLOCK), share_tC, strict=True):
            scaled_CD = chunk.hidden_CD * -share_C[:, None]
            d_weight_BD, mass_CB = gradients.weight_UD[tile], chunk.mass_CU[:, tile]
            matmuls.weight_gradient_(d_weight_BD, mass_CB, scaled_CD, accumulate=accumulate)
        gradients.weight_UD.index_add_(0, column_C, chunk.hidden_CD * d_target_C[:, None])
