"""Comparing finished runs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

TIMES = (
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_memory",
    "memory_gib",
    "rollout_tail",
    "rollout_tokens_per_second",
)


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def same_tensors(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
