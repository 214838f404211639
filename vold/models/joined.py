"""Tensors that a family's files hold as one and the trainer reads as several: Phi's qkv_proj and gate_up_proj, the
experts of a mixture.

Inside, everything (weight rules, shards, selections) knows the parts by a Llama's names; files, exports and samplers
have the joined tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vold.models.architecture import Architecture
from vold.models.families import FAMILIES
from vold.untrusted import read_json

EXPERT_TENSORS = {2: "mlp.experts.gate_up_proj", 1: "mlp.experts.down_proj"}
"""All experts in one tensor, by the number of projections that it joins: gate and up rows, [E, 2F, D], or [E, D, F]."""


def parts_of(name: str, arch: Architecture) -> dict[str, Callable[[Any], RowsOf | ExpertOf]]:
    """The parts of a stored tensor: name -> its slice from the stored one's; {} where it is no joined one. name: any
    spelling."""
    for joined, parts in arch.family.joined.items():
        if name.endswith(f".{joined}"):
            rows = [weight_rows(part, arch) for part in parts]
            prefix = name.removesuffix(joined)
            firsts = [sum(rows[:i]) for i in range(len(rows))]
            return {
                prefix + part: partial(RowsOf, first=first, rows=count)
                for part, first, count in zip(parts, firsts, rows, strict=True)
            }
    return _experts_of(name, arch)


def _experts_of(name: str, arch: Architecture) -> dict[str, Callable[[Any], ExpertOf]]:
    prefix, _, projection = name.partition(".experts.")
    if arch.mixture is None or projection not in ("gate_up_proj", "down_proj"):
        return {}
    experts, ffn, hidden = arch.mixture.experts, arch.ffn, arch.hidden
    parts, shape = ("gate", "up"), (experts, 2 * ffn, hidden)
    if projection == "down_proj":
        parts, shape = ("down",), (experts, hidden, ffn)
    return {
        f"{prefix}.experts.{number}.{part}_proj.weight": partial(
            ExpertOf, shape=shape, expert=number, part=index, parts=len(parts)
        )
        for number in range(experts)
        for index, part in enumerate(parts)
    }


def weight_rows(part: str, arch: Architecture) -> int:
    """Rows of a projection by its name, of all heads."""
    keys, net = arch.kv_heads * arch.head_dim, arch.delta_net
    rows = {"q_proj": arch.heads * arch.head_dim, "k_proj": keys, "v_proj": keys}
    if net is not None:
        keys, values = net.key_heads * net.key_width, net.value_heads * net.value_width
        rows |= {"q_proj": 2 * rows["q_proj"], "in_proj_z": values}
        rows |= dict.fromkeys(("in_proj_b", "in_proj_a"), net.value_heads)
        for x, count in (("q", keys), ("k", keys), ("v", values)):
            rows |= {f"in_proj_{x}": count, f"conv1d_{x}": count}
    return rows.get(part.split(".")[-2], arch.ffn)


def joining_architecture(checkpoint_dir: Path) -> Architecture | None:
    """The checkpoint's architecture where its files may join tensors, else None; a model that the trainer does not
    compute (a served teacher) counts as one that joins none."""
    path = checkpoint_dir / "config.json"
    family = FAMILIES.get(read_json(path).get("model_type")) if path.is_file() else None
    return Architecture.from_pretrained(checkpoint_dir) if family and (family.joined or family.experts) else None


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


@dataclass(frozen=True)
class ExpertOf:
    """Part number `part` of the rows of one expert's matrix, as such a slice. shape: of all experts' matrices; the
    published Qwen3-VL-MoE has them transposed, which transformers, too, tells by the stored shape."""

    stored: Any
    shape: tuple[int, int, int]
    expert: int
    part: int
    parts: int

    def get_shape(self) -> list[int]:
        stored = tuple(self.stored.get_shape())
        if stored not in (self.shape, self._transposed):
            return [*stored]  # another model's, which this is not
        return [self._rows, self.shape[2]]

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    @property
    def _transposed(self) -> tuple[int, int, int]:
        return (self.shape[0], self.shape[2], self.shape[1])

    @property
    def _rows(self) -> int:
        return self.shape[1] // self.parts

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """index: rows, or rows and columns, as a tensor takes them."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = rows.indices(self._rows)
        taken = slice(self.part * self._rows + start, self.part * self._rows + stop)
        one = slice(self.expert, self.expert + 1)
        if tuple(self.stored.get_shape()) == self.shape:
            return self.stored[one, taken, columns][0]
        return self.stored[one, columns, taken][0].T


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
