"""Which rows a step reads: a pure function of (seed, step), so resuming needs no state and no world size."""

from __future__ import annotations

import numpy as np


def rows_of_step(step: int, *, rows: int, per_step: int, seed: int) -> list[int]:
    """Row indices of `step` (0-based): consecutive slices of one fresh permutation per epoch, across its edge."""
    first = step * per_step
    return [_row(position, rows, seed) for position in range(first, first + per_step)]


def _row(position: int, rows: int, seed: int) -> int:
    epoch, offset = divmod(position, rows)
    return int(_permutation(rows, seed, epoch)[offset])


_CACHE: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (rows, seed, epoch)
    if key not in _CACHE:
        if len(_CACHE) > 8:
            _CACHE.clear()
        _CACHE[key] = np.random.default_rng([seed, epoch, rows]).permutation(rows)
    return _CACHE[key]
