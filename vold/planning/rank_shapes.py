"""What every process of a launch would hold of its models, built on one CPU without a weight or a second process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vold.config.schema import ParallelConfig, RlConfig, SftConfig
from vold.models.architecture import Architecture
from vold.models.language_model import build_chunks
from vold.models.weights import CheckpointReader, tensor_shapes
from vold.objectives import build_objective
from vold.parallel.launch import Layout, fake_layout, shutdown
from vold.planning.meta_memory import average_bytes, state_bytes
from vold.run.timers import GIB


@dataclass(frozen=True)
class RankShard:
    """One rank's part of a model. `tensors`: short name -> (shape of the whole, elements held here); `parameters` also
    counts the last stage's copy of a tied embedding."""

    layout: Layout
    parameters: int
    tensors: dict[str, tuple[tuple[int, ...], int]]


def show_models(config: SftConfig | RlConfig, processes: int) -> None:
    """Print bytes by rank. Raises ValueError where the layout fits neither the processes nor the models, or where a
    checkpoint's tensors are not those of its config.json."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    paths = {"student": config.student, "teacher": getattr(config, "teacher", None)}
    show({role: checked(path, role, config, processes) for role, path in paths.items() if path}, config, processes)


def checked(path: Path, role: str, config: SftConfig | RlConfig, processes: int) -> list[RankShard]:
    """What each rank would build of the `student` or `teacher` in a checkpoint directory whose tensors are those of its
    config.json. Raises ValueError where they are not."""
    train_merger = role == "student" and config.vision.train_merger
    arch = Architecture.from_pretrained(path)
    held = every_rank(arch, config.parallel, processes, train_merger=train_merger)
    check_tensors(held, path)
    return held


def every_rank(
    arch: Architecture, parallel: ParallelConfig, processes: int, *, train_merger: bool = False
) -> list[RankShard]:
    """What each of `processes` ranks would build. Leaves this process without process groups."""
    held = []
    for rank in range(processes):
        layout = fake_layout(rank, processes, **parallel.model_dump())
        with torch.device("meta"):
            chunks = build_chunks(arch, layout, torch.bfloat16, train_merger=train_merger)
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        held.append(RankShard(layout, count, {name: (shape, here) for name, shape, here in tensor_shapes(chunks)}))
    shutdown()
    return held


def check_tensors(held: Sequence[RankShard], checkpoint: Path) -> None:
    """Raises ValueError naming the first tensor of the checkpoint that has another shape than the model's."""
    with CheckpointReader(checkpoint) as reader:
        for name, shape in _shapes(held).items():
            reader.check_shape(name, shape)


def bytes_of_student(rank: RankShard, dtype: str) -> dict[str, float]:
    """Weights, gradients and optimizer, see state_bytes."""
    state = state_bytes(rank.parameters, 0, rank.layout, getattr(torch, dtype), "cpu")
    return {name: state[name] for name in ("weights", "gradients", "optimizer")}


def _rows(held: dict[str, list[RankShard]], config: SftConfig | RlConfig) -> Iterator[tuple[str, ...]]:
    """One for each place in a model copy; its data-parallel ranks hold the same."""
    size = getattr(torch, config.dtype).itemsize
    teachers = held.get("teacher") or [None] * len(held["student"])
    samples = isinstance(config, RlConfig) or bool(config.evaluation.every and config.evaluation.sets)
    sampler = samples * size * sum(math.prod(shape) for shape in _shapes(held["student"]).values())
    for student, teacher in zip(held["student"], teachers, strict=True):
        if student.layout.dp_rank:
            continue
        needs = bytes_of_student(student, config.dtype)
        needs["teacher"] = teacher.parameters * size if teacher else 0.0
        if _teaches_itself(config):
            needs["teacher"] = float(average_bytes(student.parameters, getattr(torch, config.dtype)))
        needs["sampler"] = float(sampler)
        place = f"tp {student.layout.tp_rank} pp {student.layout.pp_rank}"
        yield place, *(f"{value / GIB:.3g}" for value in (*needs.values(), sum(needs.values())))


def _teaches_itself(config: SftConfig | RlConfig) -> bool:
    if not isinstance(config, RlConfig):
        return False
    return build_objective(config.objective, config.rollout.max_new_tokens).teaches_itself


def _shapes(held: Sequence[RankShard]) -> dict[str, tuple[int, ...]]:
    return {name: shape for rank in held for name, (shape, _) in rank.tensors.items()}


def show(held: dict[str, list[RankShard]], config: SftConfig | RlConfig, processes: int) -> None:
    """Print bytes by rank; `held`: by role."""
    copies = held["student"][0].layout.dp
    caption = "Without frozen vision towers; what each phase adds: vold plan."
    if getattr(config, "teacher_offload", False):
        caption += " The teacher waits in CPU memory while the student trains."
    table = Table(
        *("rank", "weights", "gradients", "optimizer", "teacher", "sampler", "sum"),
        title=f"{processes} processes, {copies} copies of the model, GiB on each rank",
        caption=caption,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for row in _rows(held, config):
        table.add_row(*row)
    Console().print(table)
