"""One iteration of self-play: its folder, the checkpoints it begins with, and its seeds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from vold.seeding import derive_seed


class Stream(IntEnum):
    """Independent streams of random numbers within an iteration."""

    TRAIN_CHALLENGER = 0
    REWARD_ANSWERS = 1
    POSE = 2
    LABEL_ANSWERS = 3
    TRAIN_SOLVER = 4
    REPLAY = 5


@dataclass(frozen=True)
class Iteration:
    """number: 1-based; challenger_start, solver_start: checkpoint directories."""

    number: int
    folder: Path
    challenger_start: Path
    solver_start: Path

    @classmethod
    def of(cls, run_dir: Path, student: Path, number: int) -> Iteration:
        folder, before = (run_dir / f"iteration-{n:04d}" for n in (number, number - 1))
        starts = [before / player / "model" if number > 1 else student for player in ("challenger", "solver")]
        return cls(number, folder, *starts)

    def seed(self, run_seed: int, stream: Stream) -> int:
        """Below 2**30: steps and ranks are added to it."""
        return derive_seed(run_seed, self.number, stream, bits=30)
