"""The order of rows: a function of the seed and of the rows read before, never of the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vold.config.schema import CurriculumConfig


def rows_of_step(step: int, *, rows: int, per_step: int, seed: int | None) -> list[int]:
    """Row indices of `step` (0-based): consecutive slices of one fresh permutation per epoch, across its edge. Without
    a seed, of the rows as they are, epoch after epoch."""
    first = step * per_step
    return [_row(position, rows, seed) for position in range(first, first + per_step)]


class PromptOrder:
    """The same order as `rows_of_step` where steps take different numbers of rows and a curriculum skips some (see
    CurriculumConfig). Repeating the calls of a run restores its state."""

    def __init__(self, rows: int, seed: int | None, curriculum: CurriculumConfig | None = None):
        self._rows, self._seed, self._curriculum = rows, seed, curriculum
        self._position = 0
        self._pass_rate: dict[int, float] = {}  # of rows that have not come up again since

    def take(self, count: int) -> list[int]:
        """The next `count` row indices."""
        taken: list[int] = []
        while len(taken) < count:
            row = _row(self._position, self._rows, self._seed)
            self._position += 1
            if not self._skips(row):
                taken.append(row)
        return taken

    def state(self) -> dict:
        """What the next rows depend on, for `restore`."""
        return {"position": self._position, "pass_rates": dict(self._pass_rate) if self._curriculum else {}}

    def restore(self, state: dict) -> None:
        """Continue where another order, of the same rows and seed, was at its `state`."""
        self._position, self._pass_rate = state["position"], dict(state["pass_rates"])

    def update_pass_rates(self, rows: Sequence[int], pass_rates: Sequence[float | None]) -> None:
        """Record the share of right answers to each row; None where no answer could be graded."""
        for row, pass_rate in zip(rows, pass_rates, strict=True):
            if pass_rate is not None:
                self._pass_rate[row] = pass_rate

    def _skips(self, row: int) -> bool:
        """True once for each recorded pass rate outside the range: the model changes, so every row comes back."""
        pass_rate, allowed = self._pass_rate.pop(row, None), self._curriculum
        return allowed is not None and pass_rate is not None and not allowed.lowest <= pass_rate <= allowed.highest


def _row(position: int, rows: int, seed: int | None) -> int:
    epoch, offset = divmod(position, rows)
    return offset if seed is None else int(_permutation(rows, seed, epoch)[offset])


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, rows]).permutation(rows)
