"""FLOPs and bytes of one operation, from the shapes of its inputs and outputs."""

from __future__ import annotations

import math
from typing import NamedTuple

VIEWS = {"view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias", "as_strided"}
VIEWS |= {"unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "_unsafe_view", "_reshape_alias", "narrow"}
VIEWS |= {"lift_fresh", "unfold", "diagonal", "prim"}  # prim: a question about the tensor, such as its device
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Shape(NamedTuple):
    """A tensor of an operation: what it is, not what it holds."""

    dtype: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.itemsize


class Operation(NamedTuple):
    """An operation on the device as the trace counts it: equal ones are one row.

    kind     aten, triton, attention, collective
    name     aten's name with its overload, the kernel's, the call's
    site     file:function of ours that made it, and Megatron's below
    inputs, outputs   their tensors; written: those of the inputs that it writes
    segments  (queries, keys) of each packed segment, for attention
    """

    phase: str
    kind: str
    name: str
    site: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    written: tuple[Shape, ...] = ()
    segments: tuple[tuple[int, int], ...] = ()

    @property
    def is_free(self) -> bool:
        """True for views and allocations, which launch nothing."""
        return self.kind == "aten" and self.name.split(".")[0] in VIEWS | ALLOCATIONS

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products and attention; 0 for the rest."""
        if self.kind == "attention":
            return self._attention_flops()
        name = self.name.split(".")[0]
        if self.kind != "aten" or name not in ("mm", "addmm", "bmm", "baddbmm"):
            return 0
        a, b = (x.size for x in self.inputs[-2:]) if name in ("mm", "bmm") else (x.size for x in self.inputs[1:3])
        return 2 * math.prod(a) * b[-1]

    def _attention_flops(self) -> int:
        """Causal from the end of each segment: query i of q reads keys - q + i keys. Backward is five products for the
        forward pass's two."""
        query = next(x for x in self.inputs if len(x.size) >= 3)
        heads, width = query.size[-2:]
        pairs = sum(queries * (2 * keys - queries + 1) // 2 for queries, keys in self.segments)
        return 2 * heads * width * pairs * (5 if "backward" in self.name else 2)

    @property
    def bytes(self) -> int:
        """Bytes read and written on the device if every tensor passes once; 0 for views and allocations."""
        if self.is_free:
            return 0
        tensors = (*self.inputs, *self.outputs, *self.written)
        return sum(x.bytes for x in tensors if x.device == "cuda")
