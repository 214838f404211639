"""Vocabulary parallelism: one rank's rows of the vocabulary, and the merge of ranks into a softmax over all rows.

Shape letters: C tokens, R ranks, U vocabulary rows of this rank (shards may be unequal, padding rows come last over all
ranks), t tiles. A group of one takes the same path with the collectives left out. `dist.all_reduce` is invisible to
autograd, so it is only ever called inside an `autograd.Function`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

if TYPE_CHECKING:  # newer than the oldest torch that works
    from torch.distributed.distributed_c10d import GroupName


@dataclass(frozen=True)
class VocabShard:
    """One rank's consecutive rows of the vocabulary. Numbers that depend on other ranks stay on the device, so that no
    host waits for another."""

    rows: int
    """U, padding included."""
    sizes_R: Tensor
    """[R] int64, U of every rank."""
    offset: Tensor
    """[] int64, global index of this rank's first row."""
    real_rows: Tensor
    """[] int64, number of this rank's rows that are no padding; they come first."""
    vocab_size: Tensor
    """[] int64, real rows over all ranks."""
    rank: int
    group: dist.ProcessGroup | None

    def widest_shard(self) -> int:
        """Rows of the largest shard. With a group, the host waits for the device."""
        return self.rows if self.group is None else int(self.sizes_R.max())


def vocab_shard(weight_UD: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    """The rows of this rank, from the sizes of all shards (one all-reduce of R integers).

    vocab_size: real rows over all ranks; None: there is no padding. A group of one rank is none: its collectives would
    change nothing.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    rows = weight_UD.shape[0]
    sizes_R = torch.zeros(ranks, dtype=torch.int64, device=weight_UD.device)
    sizes_R[rank].fill_(rows)  # a number assigned by [] would be copied from the host, which waits for that
    all_reduce_(sizes_R, group)
    offset, real_total = sizes_R[:rank].sum(), sizes_R.sum()
    if vocab_size is not None:
        real_total = real_total.clamp(max=vocab_size)
    return VocabShard(rows, sizes_R, offset, (real_total - offset).clamp(0, rows), real_total, rank, group)


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """Name of a group, for operators of torch.library, which cannot take the group itself."""
    return None if group is None else group.group_name


def group_from_name(name: str | None) -> dist.ProcessGroup | None:
    """Inverse of `group_name`."""
    return None if name is None else _resolve_process_group(cast("GroupName", name))


def all_reduce_(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces in place over the group and returns the tensor. Without a group, returns it as it is."""
    if group is not None:
        dist.all_reduce(tensor, op, group=group)
    return tensor


def all_gather(local_part: Tensor, shard: VocabShard) -> Tensor:
    """[R, ...] the parts of all ranks, of one shape. One SUM: adding zeros keeps every bit, infinities included."""
    all_parts = local_part.new_zeros(len(shard.sizes_R), *local_part.shape)
    all_parts[shard.rank] = local_part
    return all_reduce_(all_parts, shard.group)


def merge(folded_4C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[4, C] running statistics over all ranks' rows from those over this rank's (`softmax.py`): one MAX, one SUM.

    A rank whose rows are all padding holds (EMPTY, 0, 0, 0), which exp(EMPTY − max) = 0 cancels.
    """
    max_C = all_reduce_(folded_4C[0].clone(), group, dist.ReduceOp.MAX)
    return torch.cat((max_C[None], all_reduce_(_rebased(folded_4C, max_C), group)))


def merge_tiles(folded_4tC: Tensor) -> Tensor:
    """[4, C] running statistics over the tiles of one rank, from [4, t, C]."""
    max_C = folded_4tC[0].amax(dim=0)
    return torch.cat((max_C[None], _rebased(folded_4tC, max_C).sum(dim=1)))


def _rebased(folded_4: Tensor, new_max: Tensor) -> Tensor:
    """[3, ...] sum, gap sum and target logit, the first two relative to another max."""
    shift = folded_4[0] - new_max
    scale = shift.exp()
    return torch.stack((folded_4[1] * scale, (folded_4[2] + shift * folded_4[1]) * scale, folded_4[3]))
