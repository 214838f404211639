"""Which rows a step reads: a pure function of (seed, step), so resuming needs no state and no world size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def rows_of_step(step: int, *, rows: int, per_step: int, seed: int) -> list[int]:
    """Row indices of `step` (0-based): consecutive slices of one fresh permutation per epoch, across its edge."""
    first = step * per_step
    return [_row(position, rows, seed) for position in range(first, first + per_step)]


def _row(position: int, rows: int, seed: int) -> int:
    epoch, offset = divmod(position, rows)
    return int(_permutation(rows, seed, epoch)[offset])


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, rows]).permutation(rows)
