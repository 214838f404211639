"""One of two ranks before the same engines. Usage: torchrun engine_ranks.py CHECKPOINT WEIGHTS_DIR URL URL"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.rollout.vllm import weight_files
from vold.rollout.vllm.engines import Request
from vold.rollout.vllm.remote import RemoteEngines


def weights(made: list[str]) -> Iterator[tuple[str, Tensor]]:
    """A stream that is a collective: it stands still when one rank leaves it."""
    for name in "abc":
        whole = torch.ones(2)
        dist.all_reduce(whole)
        made.append(name)
        yield name, whole


def no_room(named_weights, directory: Path) -> None:
    next(named_weights)
    raise ValueError("no room")


def main(checkpoint: str, weights_dir: str, *urls: str) -> None:
    dist.init_process_group("gloo")
    remote = RemoteEngines(Path(checkpoint), VllmConfig(urls=urls, weights_dir=Path(weights_dir)))
    made: list[str] = []
    remote.load_weights(weights(made), 1)
    answers = dict(remote.stream([Request((5, 6), (), {"n": 1, "logprobs": 0})] * 12))
    weight_files.write_parts = no_room
    refused: list[str] = []
    try:
        remote.load_weights(weights(refused), 2)
    except ValueError as error:
        line = f"{len(answers)} answers, {len(made)} + {len(refused)} weights, {error}"
        print(f"rank {dist.get_rank()}: {line}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
