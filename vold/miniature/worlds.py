"""Worlds other than the demo's, each named by its keys: what a teacher believes and how it writes, what the base and
the self-play solver have learned, what a degraded picture shows.

A world shares with the others all that is equal: a checkpoint lies in the folder that is named by the keys it depends
on, and problems lie in the folder of the seed. The defaults are the demo's world, at its place.
`vold.miniature.check` measures whether a world is what its keys say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

from vold.miniature import pretrain
from vold.miniature.data import DataSizes, write_held_out, write_pictures
from vold.miniature.examples import Style, solver_example, teacher_example, vision_teacher_example
from vold.miniature.facts import FactTable, scattered_facts, systematic_facts, wrong_facts
from vold.miniature.make import MiniatureWorld, make_world

Extra = Literal["solver", "pictures"]
HELD_OUT = DataSizes(val=300, test=2000)
PICTURES = DataSizes(train=1536)
DEGRADED_SCALE = 0.3
"""Of the copies that still show large shapes; VA-OPD's own scale of .1 leaves none."""
POSE_REQUEST = "="
"""As in vold/miniature/configs/selfplay.yaml."""


class WorldKeys(BaseModel):
    """What a world is like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(
        default=0, ge=0, description="initial weights of base and teacher, all problems, which facts are wrong"
    )
    teacher_accuracy: Literal[1.0, 0.84, 0.70] = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=1.0,
        description="share of whole problems that the text teacher solves: some single facts, as 3*9, it has wrong and "
        "is sure of, the same each time",
    )
    reads_hints: bool = Field(
        default=False,
        description="the base finds a trace's values from the answer `\\boxed{4}` that a self-teacher is shown behind "
        "the problem (vold/miniature/configs/rl.yaml: self_teacher)",
    )
    style: Style = Field(
        default="plain",
        description="wordy: teachers write filler words where plain ones write dots, 12 of a trace's 37 tokens; which "
        "words is a matter of style",
    )
    errors: Literal["systematic", "scattered"] = Field(
        default="systematic",
        description="of the solver that self-play starts with; both solve 35 % by drawn responses: by wrong facts, the "
        "same each time, or by facts that are all uncertain, the right value the likeliest",
    )
    degraded: Literal["nothing", "shapes"] = Field(
        default="nothing",
        description="what degraded pictures of VA-OPD show; shapes: large digits, not the small one; their files are "
        "in the column `degraded`",
    )


@dataclass(frozen=True)
class World(MiniatureWorld):
    """A MiniatureWorld whose validation and test problems are the larger sets of `held_out`: 300 and 2,000 of each
    modality, no problem twice in a set.

    folder           of the world itself
    solver           self-play's start, solves and poses; there with the extra `solver`
    vision_teacher   and `pictures`, the files of data.PICTURE_FILES: there with the extra `pictures`
    """

    held_out: Path
    folder: Path
    solver: Path
    vision_teacher: Path
    pictures: Path

    def text(self, split: str) -> Path:
        """Text problems of `val` or `test`, orz-57k layout."""
        return self.held_out / f"{split}_text.json"

    def image(self, split: str) -> Path:
        """Image problems of `val` or `test`, Geometry3K layout."""
        return self.held_out / f"{split}_image.jsonl"


def world_root(root: Path, keys: WorldKeys) -> Path:
    """The folder of a world below a folder of runs: `miniature/seed0` for the defaults, as the demo's."""
    parts = [f"seed{keys.seed}"]
    parts += [f"teacher{100 * keys.teacher_accuracy:.0f}"] * (keys.teacher_accuracy != 1.0)
    parts += ["hints"] * keys.reads_hints
    parts += [value for value in (keys.style, keys.errors, keys.degraded) if value in ("wordy", "scattered", "shapes")]
    return Path(root) / "miniature" / "-".join(parts)


def open_world(
    root: Path,
    keys: WorldKeys,
    sizes: DataSizes = DataSizes(),
    held_out: DataSizes = HELD_OUT,
    extras: Collection[Extra] = (),
) -> World:
    """The world of these keys below `root`; makes what is missing of it and keeps what is there.

    Base, teacher and training problems of a seed take about 10 CPU-minutes, in two processes; each checkpoint that a
    key or an extra adds is trained from them in this one, in one to four. Raises RuntimeError as make_world does.
    """
    transformers.utils.logging.disable_progress_bar()
    seed_root = world_root(root, WorldKeys(seed=keys.seed))
    plain = make_world(seed_root, keys.seed, sizes)
    write_held_out(seed_root / "held-out", keys.seed, held_out)
    world = world_paths(root, keys)
    with _one_thread():
        if world.teacher != plain.teacher:
            traces = partial(teacher_example, table=fact_table(keys), style=keys.style)
            pretrain.make_other_teacher(world.teacher, plain.teacher, traces, keys.seed)
        if world.base != plain.base:
            pretrain.make_hint_reader(world.base, plain.base, keys.seed)
        if "solver" in extras:
            posed_and_solved = partial(solver_example, table=solver_table(keys), request=POSE_REQUEST)
            pretrain.make_solver(world.solver, plain.base, posed_and_solved, keys.seed)
        if "pictures" in extras:
            scale = DEGRADED_SCALE if keys.degraded == "shapes" else None
            write_pictures(world.pictures, keys.seed, PICTURES, scale)
            pictured = partial(vision_teacher_example, style=keys.style)
            pretrain.make_vision_teacher(world.vision_teacher, plain.base, keys.seed, example=pictured)
    return world


def fact_table(keys: WorldKeys) -> FactTable:
    """What the world's text teacher holds to be the value of each single step."""
    return wrong_facts(keys.seed, keys.teacher_accuracy)


def solver_table(keys: WorldKeys) -> FactTable:
    """What self-play's solver holds at its start."""
    return (scattered_facts if keys.errors == "scattered" else systematic_facts)(keys.seed)


def world_paths(root: Path, keys: WorldKeys) -> World:
    """Where the parts of a world are, made or not."""
    plain = MiniatureWorld.at(world_root(root, WorldKeys(seed=keys.seed)))

    def folder(*names: str) -> Path:
        return world_root(root, WorldKeys(seed=keys.seed, **{name: getattr(keys, name) for name in names}))

    return World(
        folder("teacher_accuracy", "style") / "teacher",
        folder("reads_hints") / "base",
        plain.data,
        held_out=folder() / "held-out",
        folder=world_root(root, keys),
        solver=folder("errors") / "solver",
        vision_teacher=folder("style") / "vision-teacher",
        pictures=folder("degraded") / "pictures",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    # as the workers of make_world: sums are the same on any machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
