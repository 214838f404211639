"""Sizes of chunks and tiles on a GPU: pure functions of the shape, the number of processors (SMs) and the memory.

A matmul's result is divided into blocks that the SMs compute, each SM one block at a time, so it takes whole waves of
blocks: 133 blocks on 132 SMs take as long as 264. dH of a chunk has few blocks ([C, D]), a tile of logits has not many;
the sizes below are those of the least time, counted in FLOPs of one SM:

    a matmul              waves · 2 BLOCK_ROWS BLOCK_COLUMNS · depth
    dW of each chunk      half of the traffic of its fp32 accumulation, the rest hidden under the matmul
    a chunk or tile that no other follows   its row kernels, which then run under no matmul

Shape letters: N tokens, D hidden, U vocabulary rows of this rank.
"""

from dataclasses import dataclass
from functools import lru_cache

from .chunks import TILE_COLUMNS

BLOCK_ROWS, BLOCK_COLUMNS = 128, 256
"""Block of a large bf16 matmul in cuBLAS. Assumed: its choice is not documented, and others divide these."""
FLOPS_PER_BYTE = 1.4
"""FLOPs of one SM in the time in which the memory delivers a byte: 6.0e12 / 4.3e12 on an H200, 2.45e12 / 1.75e12 on an
A100."""
FOLD_BYTES, ROW_BYTES = 4, 10
"""Bytes per fp32 logit of fold, which reads 4, and of both row kernels: dlogits reads 4 and writes 2."""
LAUNCH_FLOPS = 1.2e7
"""FLOPs of one SM in the 2 µs between two kernels."""


@dataclass(frozen=True)
class HeadShape:
    """A head and the tokens it is given."""

    tokens: int
    hidden: int
    rows: int
    """Vocabulary rows of the widest rank, of all heads together that are resident at once."""


def waves(rows: int, columns: int, sms: int) -> int:
    """Waves of blocks in which a [rows, columns] result is computed."""
    return -(-(-(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)) // sms)


def bytes_within(wanted: int, free: int) -> int:
    """Bytes for all logits: `wanted`, halved until it is at most half of the free memory, but not below 1/16.

    Halving, not the free memory itself: the sizes, and with them the rounding of results, change only where memory is
    short.
    """
    return next((wanted >> j for j in range(4) if wanted >> j <= free // 2), wanted >> 4)


def shared_bytes(wanted: int) -> int:
    """The same where ranks share a head: half, whatever is free. They must choose alike, and each knows its own free
    memory alone."""
    return wanted // 2


@lru_cache(maxsize=256)
def resident_tokens(shape: HeadShape, most: int, sms: int) -> int | None:
    """Tokens of each resident chunk, at most `most`: the size of the least total time over all N tokens. None: not even
    a block fits."""
    sizes = [size for size in range(BLOCK_ROWS, most + 1, BLOCK_ROWS) if size < shape.tokens + BLOCK_ROWS]
    return min(sizes, key=lambda size: (resident_flops(shape, size, sms), size), default=None)


def resident_flops(shape: HeadShape, chunk_tokens: int, sms: int) -> float:
    """Time of a policy loss over all tokens in chunks of this size, in FLOPs of one SM."""
    whole, rest = divmod(shape.tokens, chunk_tokens)
    chunks = whole * _chunk_flops(shape, chunk_tokens, sms) + (_chunk_flops(shape, rest, sms) if rest else 0.0)
    alone = ROW_BYTES * shape.rows * shape.tokens * FLOPS_PER_BYTE if whole + bool(rest) < 2 else 0.0
    return chunks + alone


def _chunk_flops(shape: HeadShape, tokens: int, sms: int) -> float:
    blocks_by_depth = (
        waves(tokens, shape.rows, sms) * shape.hidden
        + waves(tokens, shape.hidden, sms) * shape.rows
        + waves(shape.rows, shape.hidden, sms) * tokens
    )
    accumulation_bytes = 8 * shape.rows * shape.hidden
    return 2 * BLOCK_ROWS * BLOCK_COLUMNS * blocks_by_depth + accumulation_bytes / 2 * FLOPS_PER_BYTE


@lru_cache(maxsize=256)
def tile(shape: HeadShape, most_numbers: int, most: tuple[int, int], sms: int) -> tuple[int, int] | None:
    """(tokens, columns) of a tile of at most `most_numbers` logits and at most `most` of each, of the least total time.
    Columns are a multiple of TILE_COLUMNS, so that tiled and resident folds of equal logits agree to the bit. None: not
    even a block of tokens fits."""
    sizes = [
        (tokens, min(columns, shape.rows))
        for columns in range(TILE_COLUMNS, min(most[1], shape.rows + TILE_COLUMNS - 1) + 1, TILE_COLUMNS)
        for tokens in range(BLOCK_ROWS, min(most[0], shape.tokens + BLOCK_ROWS - 1) + 1, BLOCK_ROWS)
        if tokens * min(columns, shape.rows) <= most_numbers
    ]
    return min(sizes, key=lambda size: (tile_flops(shape, size, sms), size), default=None)


def tile_flops(shape: HeadShape, size: tuple[int, int], sms: int) -> float:
    """Time of all tiles of this size, in FLOPs of one SM. The row kernel of the last tile runs under no matmul."""
    tokens, columns = size
    total = 0.0
    for tile_tokens, token_count in _parts(shape.tokens, tokens):
        for tile_columns, column_count in _parts(shape.rows, columns):
            block_flops = 2 * BLOCK_ROWS * BLOCK_COLUMNS * shape.hidden
            one = waves(tile_tokens, tile_columns, sms) * block_flops + LAUNCH_FLOPS
            total += token_count * column_count * one
    return total + FOLD_BYTES * tokens * columns * FLOPS_PER_BYTE


def _parts(total: int, step: int) -> list[tuple[int, int]]:
    """[(size, count)] of the pieces of `total`."""
    whole, rest = divmod(total, step)
    return [(size, count) for size, count in ((step, whole), (rest, 1)) if size and count]
