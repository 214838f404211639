"""Sizes of the pieces in which the [N, V] logits are computed.

Shape letters: N tokens, C tokens of one chunk, U vocabulary rows of this rank.
A *resident* chunk holds all U columns of C tokens, because its gradient is formed in place; a *tile* holds a slice of
columns, because a forward pass only folds them into statistics. Neither depends on N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE_COLUMNS = 8192  # a multiple of the row kernel's block


@dataclass(frozen=True)
class ChunkBudget:
    """Memory for logits. Results do not depend on it beyond rounding."""

    resident_bytes: int
    """Bytes of the resident chunk, of both where two lanes overlap."""
    tile_bytes: int = 64 << 20
    """Bytes of the tile, likewise: 64 MiB is 2048 tokens × 8192 columns in fp32."""
    tile_columns: int = TILE_COLUMNS
    """Columns of one tile, at most."""
    max_tokens: int = 8192
    """Tokens of a chunk or a tile, at most."""
    bf16_logits: bool = False
    """Round logits to bf16: half the bytes and traffic, log-probs off by up to 2^-8 of the largest logit. Needs bf16
    inputs. The old and the new log-probs of a ratio must be made alike. (A CPU rounds too, but stores fp32.)"""
    overlap: bool = True
    """On a GPU, divide the bytes between two chunks (tiles), so that the row kernels of one run under the matmuls of
    the other (`lanes.py`). A CPU has no second lane."""

    def resident_tokens(self, columns: int, itemsize: int, tokens: int) -> int:
        """Tokens of each resident chunk when `tokens` are divided into as few chunks as the budget allows, of about
        equal size: a short last chunk would still cost a whole pass over dW."""
        most = max(1, min(self.resident_bytes // (columns * itemsize), self.max_tokens))
        chunks = -(-max(tokens, 1) // most)
        equal_share = -(-max(tokens, 1) // chunks)
        step = 128 if most >= 1024 else 16  # rows that the matmul libraries process at a time
        return min(-(-equal_share // step) * step, most)

    def tile(self, columns: int, itemsize: int) -> tuple[int, int]:
        """(tokens, columns) of one tile."""
        columns = min(columns, self.tile_columns)
        tokens = min(self.tile_bytes // (columns * itemsize), self.max_tokens)
        return tokens // 128 * 128 if tokens > 128 else max(tokens, 1), columns


def default_budget(device: torch.device) -> ChunkBudget:
    """The budget used when a caller gives none.

    GPU: 5 GiB, twice 4096 tokens of a 151936-row head in fp32; below about 2048 tokens the fp32 traffic of dW is
    measurable. Tiles .75 GiB. Where memory is short, half of it or less (`waves.bytes_within`).
    CPU: 256 MiB, 441 tokens of that head, and tiles that fit into its caches.
    """
    if device.type == "cuda":
        return ChunkBudget(resident_bytes=5 << 30, tile_bytes=3 << 28, tile_columns=4 * TILE_COLUMNS)
    return ChunkBudget(resident_bytes=256 << 20, tile_bytes=3 << 20, tile_columns=2048)


def slices(total: int, step: int, *, first: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `range(first, total)`."""
    for start in range(first, total, step):
        yield slice(start, min(start + step, total))
