"""Worlds other than the demo's, each named by its keys: what a teacher believes and how it writes, what the base and
the self-play solver have learned, what a degraded picture shows.

A world shares with the others all that is equal: the checkpoint of a key lies in the folder that is named by this key
alone, and the training problems lie in the folder of the seed. The defaults are the demo's world, at its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from vold.miniature.data import DataSizes, write_held_out
from vold.miniature.facts import FactTable, wrong_facts
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.pretrain import make_mistaken_teacher


class WorldKeys(BaseModel):
    """What a world is like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="initial weights of base and teacher, all problems, which facts are wrong")
    teacher_accuracy: Literal[1.0, 0.84, 0.70] = Field(
        1.0,
        description="share of whole problems that the text teacher solves: some single facts, as 3*9, it has wrong "
        "and is sure of, the same each time",
    )


HELD_OUT = DataSizes(val=300, test=2000)


@dataclass(frozen=True)
class World(MiniatureWorld):
    """A MiniatureWorld whose validation and test problems are the larger sets of `held_out`: 300 and 2,000 of each
    modality, no problem twice in a set."""

    held_out: Path

    def text(self, split: str) -> Path:
        """Text problems of `val` or `test`, orz-57k layout."""
        return self.held_out / f"{split}_text.json"

    def image(self, split: str) -> Path:
        """Image problems of `val` or `test`, Geometry3K layout."""
        return self.held_out / f"{split}_image.jsonl"


def world_root(root: Path, keys: WorldKeys) -> Path:
    """The folder of a world below a folder of runs: `miniature/seed0` for the defaults, as the demo's."""
    parts = [f"seed{keys.seed}"]
    if keys.teacher_accuracy != 1.0:
        parts.append(f"teacher{100 * keys.teacher_accuracy:.0f}")
    return Path(root) / "miniature" / "-".join(parts)


def open_world(root: Path, keys: WorldKeys, sizes: DataSizes = DataSizes(), held_out: DataSizes = HELD_OUT) -> World:
    """The world of these keys below `root`; makes what is missing of it and keeps what is there.

    Base, teacher and training problems of a seed take about 10 CPU-minutes, in two processes; what a key adds is
    trained from them in this one, in less than two. Raises RuntimeError as make_world does.
    """
    seed_root = world_root(root, WorldKeys(seed=keys.seed))
    plain = make_world(seed_root, keys.seed, sizes)
    problems = write_held_out(seed_root / "held-out", keys.seed, held_out)
    with _one_thread():
        teacher = plain.teacher
        if keys.teacher_accuracy != 1.0:
            folder = _folder(root, keys, "teacher_accuracy")
            teacher = make_mistaken_teacher(folder / "teacher", plain.teacher, fact_table(keys), keys.seed)
    return World(teacher, plain.base, plain.data, problems)


def fact_table(keys: WorldKeys) -> FactTable:
    """What the world's text teacher holds to be the value of each single step."""
    return wrong_facts(keys.seed, keys.teacher_accuracy)


def _folder(root: Path, keys: WorldKeys, *names: str) -> Path:
    """The folder of the world with these keys alone."""
    return world_root(root, WorldKeys(seed=keys.seed, **{name: getattr(keys, name) for name in names}))


@contextmanager
def _one_thread() -> Iterator[None]:
    # as the workers of make_world: sums are the same on any machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
