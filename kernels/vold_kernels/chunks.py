"""How much of the [N, V] logits exists at once: the one place where sizes are decided.

Shape letters: N tokens, C tokens of one chunk, U vocabulary rows of this rank.
Two shapes of work: a *resident* chunk holds all U columns of C tokens, because its gradient is formed in place; a
*tile* holds a slice of columns, because a forward pass only folds them away. Neither depends on how long N is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE_COLUMNS = 8192  # a multiple of the row kernel's block


@dataclass(frozen=True)
class ChunkBudget:
    """Bytes of logits alive at once. Results do not depend on them beyond rounding."""

    resident_bytes: int
    tile_bytes: int = 64 << 20
    """64 MiB is 2048 tokens × 8192 columns."""
    tile_columns: int = TILE_COLUMNS
    max_tokens: int = 8192
    bf16_logits: bool = False
    """Round logits to bf16: half the bytes and traffic, log-probs off by up to 2^-8 of the largest logit. Needs bf16
    inputs. The old and the new log-probs of a ratio must be made alike. (A CPU rounds too, but stores fp32.)"""

    def resident_tokens(self, columns: int, itemsize: int, total: int) -> int:
        """Of each chunk of `total` tokens: as few chunks as fit, of about equal size (a short last one would cost a
        whole pass over dW)."""
        most = max(1, min(self.resident_bytes // (columns * itemsize), self.max_tokens))
        each = -(-max(total, 1) // -(-max(total, 1) // most))
        step = 128 if most >= 1024 else 16  # rows that the matmul libraries take at a time
        return min(-(-each // step) * step, most)

    def tile(self, columns: int, itemsize: int) -> tuple[int, int]:
        """(tokens, columns) of one tile."""
        columns = min(columns, self.tile_columns)
        return _tokens(self.tile_bytes, columns * itemsize, self.max_tokens), columns


def default_budget(device: torch.device) -> ChunkBudget:
    """A GPU gets 2 GiB, 3456 tokens of a 151936-row head: below about 2048 the fp32 traffic of dW shows. A CPU gets
    256 MiB, 441 of them, and tiles that its caches hold."""
    if device.type == "cuda":
        return ChunkBudget(resident_bytes=2 << 30)
    return ChunkBudget(resident_bytes=256 << 20, tile_bytes=3 << 20, tile_columns=2048)


def slices(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `range(total)`."""
    for first in range(0, total, step):
        yield slice(first, min(first + step, total))


def _tokens(budget: int, bytes_per_token: int, most: int) -> int:
    tokens = min(budget // bytes_per_token, most)
    return tokens // 128 * 128 if tokens > 128 else max(tokens, 1)
