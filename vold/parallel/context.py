"""Context parallelism: the c ranks of a cp group share the tokens of a micro-batch. Around attention, which reads
across tokens, they exchange tokens for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Rank r has the tokens r, r + c, r + 2c, ... : of every segment, prompt and response as many as another rank, so that the
loss's rows are balanced as the tokens are.

T tokens of the group (c divides it), t = T / c of a rank, w columns of one rank's heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from vold.parallel.launch import Layout


def own_tokens(layout: Layout) -> slice:
    """This rank's tokens among the T."""
    return slice(layout.cp_rank, None, layout.cp)


def own_count(tokens: int, layout: Layout) -> int:
    """How many of the first `tokens` tokens are this rank's."""
    return len(range(layout.cp_rank, tokens, layout.cp))


def is_own(token_N: Tensor, layout: Layout) -> Tensor:
    """bool [N]: which of these tokens, indices into T, are this rank's. Its own index of token i is i // c."""
    return token_N % layout.cp == layout.cp_rank


def tokens_for_heads(x_tcw: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, c, w], the columns of each rank's heads -> [T, w]: all tokens, this rank's columns. Differentiable."""
    t, c, w = x_tcw.shape
    sent = x_tcw.transpose(0, 1).reshape(c * t, w)
    return all_to_all(group, sent).view(c, t, w).transpose(0, 1).reshape(t * c, w)


def heads_for_tokens(x_Tw: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, w], this rank's columns -> [t, c w]: this rank's tokens, all columns in the order of the ranks.
    Differentiable."""
    c, w = group.size(), x_Tw.shape[1]
    sent = x_Tw.view(-1, c, w).transpose(0, 1).reshape(-1, w)
    return all_to_all(group, sent).view(c, -1, w).transpose(0, 1).reshape(-1, c * w)


@torch.no_grad()
def sum_over_tokens(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """The sums of the cp ranks' tensors, on each of them; one collective for all. Without cp they are returned as they
    are."""
    if layout.cp == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    dist.all_reduce(flat, group=layout.cp_group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
