"""Tensors that a family's files hold as one and the trainer reads as several: Phi's qkv_proj and gate_up_proj.

Inside, everything (weight rules, shards, selections) knows the parts by a Llama's names; files, exports and samplers
have the joined tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vold.models.architecture import Architecture
from vold.models.families import FAMILIES
from vold.untrusted import read_json


def parts_of(name: str, arch: Architecture) -> list[tuple[str, int, int]]:
    """(name, first row, rows) of each part of a stored tensor; [] where it is no joined one. name: any spelling."""
    for joined, parts in arch.family.joined.items():
        if name.endswith(f".{joined}"):
            rows = [_rows(part, arch) for part in parts]
            prefix = name.removesuffix(joined)
            return [(prefix + part, sum(rows[:i]), rows[i]) for i, part in enumerate(parts)]
    return []


def _rows(part: str, arch: Architecture) -> int:
    keys = arch.kv_heads * arch.head_dim
    return {"q_proj": arch.heads * arch.head_dim, "k_proj": keys, "v_proj": keys}.get(part.split(".")[-2], arch.ffn)


def joining_architecture(checkpoint_dir: Path) -> Architecture | None:
    """The checkpoint's architecture where its family joins tensors, else None; a model that the trainer does not
    compute (a served teacher) counts as one that joins none."""
    path = checkpoint_dir / "config.json"
    family = FAMILIES.get(read_json(path).get("model_type")) if path.is_file() else None
    return Architecture.from_pretrained(checkpoint_dir) if family and family.joined else None


@dataclass(frozen=True)
class RowsOf:
    """Rows [first, first + rows) of a lazily read safetensors slice, as such a slice."""

    stored: Any
    first: int
    rows: int

    def get_shape(self) -> list[int]:
        total, *rest = self.stored.get_shape()
        return [max(0, min(self.rows, total - self.first)), *rest]

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """index: rows, or rows and columns, as a tensor takes them."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, _ = rows.indices(self.rows)
        taken = slice(self.first + start, self.first + stop)
        return self.stored[(taken, *rest) if rest else taken]


def join_stream(stream: Iterator[tuple[str, Tensor]], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) with the parts of a joined tensor, which follow each other, as one, under the name in files."""
    last = {parts[-1]: (joined, len(parts)) for joined, parts in arch.family.joined.items()}
    parts = {part for parts in arch.family.joined.values() for part in parts}
    waiting: list[Tensor] = []
    for name, tensor in stream:
        short = next((part for part in parts if name.endswith(f".{part}")), None)
        if short is None:
            yield name, tensor
            continue
        waiting.append(tensor)
        if short in last:
            joined, count = last[short]
            assert len(waiting) == count
            yield name.removesuffix(short) + joined, torch.cat(waiting)
            waiting.clear()
