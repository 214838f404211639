"""One rank's rows of the vocabulary, and the merge that makes them a softmax over all of it.

Shape letters: C tokens, U vocabulary rows of this rank (shards may be unequal, padding rows sit at the global end).
A world of 1 takes the same path with the collectives left out. `dist.all_reduce` is invisible to autograd, so it is
only ever called inside an `autograd.Function`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Kept on the device, so that no rank waits for another's host."""

    rows: int
    """U, padding included."""
    sizes_R: Tensor
    """[R] int64, U of every rank."""
    offset: Tensor
    """[] int64, global index of this rank's first row."""
    real: Tensor
    """[] int64, how many of this rank's rows are real (from the front); the rest is padding."""
    total: Tensor
    """[] int64, real rows of all ranks together."""
    rank: int
    group: dist.ProcessGroup | None

    def widest(self) -> int:
        """Rows of the largest shard. Reads the device: callers that already wait for the host, and tp > 1, only."""
        return self.rows if self.group is None else int(self.sizes_R.max())


def vocab_shard(weight_UD: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    """Where this rank's rows lie. One all-reduce of R integers; `vocab_size` counts the real rows of all ranks."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    rows = weight_UD.shape[0]
    sizes_R = torch.zeros(ranks, dtype=torch.int64, device=weight_UD.device)
    sizes_R[rank] = rows
    all_reduce_(sizes_R, group)
    offset, total = sizes_R[:rank].sum(), sizes_R.sum()
    if vocab_size is not None:
        total = total.clamp(max=vocab_size)
    return VocabShard(rows, sizes_R, offset, (total - offset).clamp(0, rows), total, rank, group)


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """What an operator of torch.library takes in place of a group; `group_named` is the way back."""
    return None if group is None else group.group_name


def group_named(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def all_reduce_(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    if group is not None:
        dist.all_reduce(tensor, op, group=group)
    return tensor


def gather(mine: Tensor, shard: VocabShard) -> Tensor:
    """[R, ...] what every rank brings, of one shape. One SUM: adding to zeros moves bits, infinities included."""
    everyone = mine.new_zeros(len(shard.sizes_R), *mine.shape)
    everyone[shard.rank] = mine
    return all_reduce_(everyone, shard.group)


def merge(folded_4C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Statistics over this rank's rows (see `rows.py`) -> over all rows: one MAX, one SUM.

    A rank whose rows are all padding brings (EMPTY, 0, 0, 0), which exp(EMPTY − top) = 0 wipes out.
    """
    top_C = all_reduce_(folded_4C[0].clone(), group, dist.ReduceOp.MAX)
    return torch.cat((top_C[None], all_reduce_(_against(folded_4C, top_C), group)))


def merge_tiles(folded_4tC: Tensor) -> Tensor:
    """The same over the tiles of one rank: [4, t, C] -> [4, C]."""
    top_C = folded_4tC[0].amax(dim=0)
    return torch.cat((top_C[None], _against(folded_4tC, top_C).sum(dim=1)))


def _against(folded_4: Tensor, top: Tensor) -> Tensor:
    """[3, ...] total, spread and target logit, the first two taken against another top."""
    shift = folded_4[0] - top
    scale = shift.exp()
    return torch.stack((folded_4[1] * scale, (folded_4[2] + shift * folded_4[1]) * scale, folded_4[3]))
