"""Targets of a micro-batch under context parallelism: each rank of the cp group computes the loss, or the log-probs, of
those whose tokens it has, n of N."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from vold.parallel.context import is_own
from vold.parallel.launch import Layout
from vold.types import MicroBatch

PER_TARGET = tuple(field.name for field in fields(MicroBatch) if field.name.endswith("_N"))


def own_targets(micro: MicroBatch, layout: Layout) -> MicroBatch:
    """The micro-batch with this rank's targets alone, whose source_N indexes this rank's tokens. Rows of teachers in it
    (hidden states, most probable ids) are of these targets already. The micro-batch itself without context
    parallelism."""
    if layout.cp == 1:
        return micro
    rows_n = is_own(micro.source_N, layout).nonzero()[:, 0]
    values = {name: getattr(micro, name) for name in PER_TARGET}
    chosen = {name: value if value is None else value[rows_n] for name, value in values.items()}
    terms = tuple(replace(term, weight_N=term.weight_N[rows_n]) for term in micro.further_terms)
    return replace(micro, **chosen | {"source_N": micro.source_N[rows_n] // layout.cp, "further_terms": terms})


def own_rows(micro: MicroBatch, rows_n: Tensor, values_n: Tensor, layout: Layout) -> Tensor:
    """Of values for some targets, indices rows_n or a mask, those of this rank's targets."""
    if layout.cp == 1:
        return values_n
    return values_n[is_own(micro.source_N[rows_n], layout).to(values_n.device)]


def among_all(micro: MicroBatch, values_n: Tensor, layout: Layout) -> Tensor:
    """[N, ...]: values of this rank's targets among those of all N, 0 at the others'."""
    if layout.cp == 1:
        return values_n
    values_N = values_n.new_zeros(len(micro.source_N), *values_n.shape[1:])
    values_N[is_own(micro.source_N, layout)] = values_n
    return values_N


@torch.no_grad()
def of_all_ranks(micro: MicroBatch, values_n: Tensor, layout: Layout) -> Tensor:
    """[N, ...]: the values of all N targets, on every rank of the cp group; all of them call."""
    values_N = among_all(micro, values_n, layout)
    if layout.cp > 1:
        dist.all_reduce(values_N, group=layout.cp_group)
    return values_N
