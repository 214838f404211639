"""Tensors that every rank of a launch would hold, built on one CPU without weights or a second process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vold.config.schema import ParallelConfig
from vold.models.architecture import Architecture
from vold.models.checkpoint_reader import CheckpointReader
from vold.models.student import build_student
from vold.models.weight_rules import tensor_shapes
from vold.parallel.launch import Layout, fake_layout, shutdown


@dataclass(frozen=True)
class RankShard:
    """One rank's part of a model.

    tensors: short name -> (shape of the undivided tensor, elements on this rank). parameters: elements on this rank,
    the last stage's copy of a tied embedding included.
    """

    layout: Layout
    parameters: int
    tensors: dict[str, tuple[tuple[int, ...], int]]


def rank_shards(arch: Architecture, parallel: ParallelConfig, processes: int, **trained) -> list[RankShard]:
    """The part that each of `processes` ranks would build, by rank. trained: see build_student. Leaves this process
    without process groups."""
    shards = []
    for rank in range(processes):
        layout = fake_layout(rank, processes, **parallel.model_dump())
        with torch.device("meta"):
            chunks = build_student(arch, layout, torch.bfloat16, **trained)
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        shards.append(RankShard(layout, count, {name: (shape, here) for name, shape, here in tensor_shapes(chunks)}))
    shutdown()
    return shards


def check_tensors(shards: Sequence[RankShard], checkpoint: Path, arch: Architecture) -> int:
    """Compare the shape of every tensor in a checkpoint directory with the model's. Returns the number of tensors.

    Raises ValueError naming the first tensor that differs, or that the model would leave out.
    """
    shapes = {name: shape for shard in shards for name, (shape, _) in shard.tensors.items()}
    with CheckpointReader(checkpoint) as reader:
        reader.check_names(arch)
        for name, shape in shapes.items():
            reader.check_shape(name, shape)
    return len(shapes)
