"""The weight sync through files: the trainer writes safetensors files that engines on the same machine read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PART_BYTES = 1 << 30
"""A file is written when it has so many bytes: the writing rank holds no more of the stream at a time."""


def write_parts(named_weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write safetensors files of about PART_BYTES. Raises ValueError when the disk is too small."""
    part: dict[str, Tensor] = {}

    def write() -> None:
        needed, free = sum(tensor.nbytes for tensor in part.values()), shutil.disk_usage(directory).free
        if needed > 0.95 * free:
            raise ValueError(
                f"vllm.weights_dir = {directory.parent} has {free / 2**30:.1f} GiB free, too little for the "
                "weights of two versions; choose another directory"
            )
        save_file(part, directory / f"part-{len(list(directory.iterdir())):05d}.safetensors")
        part.clear()

    for name, tensor in named_weights:
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in part.values()) >= PART_BYTES:
            write()
    if part:
        write()
