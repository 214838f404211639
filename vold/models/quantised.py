"""Frozen linear layers whose weights are held in 8 or 4 bits, by bitsandbytes (QLoRA, arXiv 2305.14314).

A weight is put together again where it is read: in the forward pass, in the backward pass, and where the update is
merged into it. Between, the parameter keeps its shape and type and has no memory.

T tokens of this rank, D inputs, W rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

BLOCK = {8: 256, 4: 64}
"""Weights that share a scale."""
BYTES = {8: 1 + 4 / BLOCK[8], 4: 0.5 + 1 / BLOCK[4] + 4 / BLOCK[4] / 256}
"""Of a weight with its share of the scales; those of 4 bits are held in 8 bits themselves, 256 to a scale."""


def open_bitsandbytes() -> Any:
    """bitsandbytes' functions. Raises ValueError where it is not installed."""
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ValueError(
            f"adapter.base_bits needs bitsandbytes: pip install bitsandbytes, or leave it out ({error})"
        ) from None


class QuantisedWeight:
    """A weight [W, D] in 8 bits, or in 4 (NF4, with its scales quantised too)."""

    def __init__(self, weight: Tensor, bits: int):
        self._bits, self._functions = bits, open_bitsandbytes()
        weight = weight.detach().contiguous()
        if bits == 4:
            options = {"blocksize": BLOCK[4], "quant_type": "nf4", "compress_statistics": True}
            self._packed, self._state = self._functions.quantize_4bit(weight, **options)
        else:
            self._packed, self._state = self._functions.quantize_blockwise(weight, blocksize=BLOCK[8])
        self._shape, self._dtype = weight.shape, weight.dtype

    def whole(self) -> Tensor:
        """The weight as it is computed with, in newly allocated memory."""
        put_together = self._functions.dequantize_4bit if self._bits == 4 else self._functions.dequantize_blockwise
        return put_together(self._packed, self._state).view(self._shape).to(self._dtype)


class _Linear(torch.autograd.Function):
    """x times a quantised weight; what the backward pass keeps is the quantised one."""

    @staticmethod
    def forward(ctx, x_T1D: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x_T1D, weight.whole())

    @staticmethod
    def backward(ctx, d_out_T1W: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return d_out_T1W @ ctx.weight.whole(), None


class QuantisedColumn(ColumnParallelLinear):
    """Megatron's layer with a frozen quantised weight."""

    def forward(self, input_: Tensor, *_args, **_options) -> tuple[Tensor, None]:  # pyright: ignore
        is_sp = self.sequence_parallel
        across = gather_from_sequence_parallel_region if is_sp else copy_to_tensor_model_parallel_region
        out = _Linear.apply(across(input_), self.weight.quantised)
        return (out if self.bias is None else out + self.bias), None  # pyright: ignore[reportOperatorIssue]


class QuantisedRow(RowParallelLinear):
    """See QuantisedColumn."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = _Linear.apply(input_, self.weight.quantised)
        is_sp = self.sequence_parallel
        across = reduce_scatter_to_sequence_parallel_region if is_sp else reduce_from_tensor_model_parallel_region
        return across(out), None


@torch.no_grad()
def quantise(chunk: nn.Module, bits: int) -> None:
    """Replace the frozen linear layers of a loaded chunk's decoder, one after another."""
    for linear in decoder_linears(chunk):
        kind = QuantisedColumn if isinstance(linear, ColumnParallelLinear) else QuantisedRow
        weight: Any = linear.weight
        weight.quantised = QuantisedWeight(weight, bits)
        weight.data = weight.new_zeros(()).expand(weight.shape)
        linear.__class__ = kind


def decoder_linears(chunk: Any) -> Iterator[nn.Module]:
    """The decoder's linear layers whose weight is frozen."""
    for module in chunk.decoder.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and not module.weight.requires_grad:
            yield module


def whole(parameter: nn.Parameter) -> Tensor:
    """A parameter's values, quantised or not."""
    quantised = getattr(parameter, "quantised", None)
    return parameter.detach() if quantised is None else quantised.whole()


def saved_bytes(shapes: Sequence[tuple[int, ...]], itemsize: int, bits: int) -> float:
    """Bytes that weights of these shapes take less than with `itemsize` bytes each."""
    return sum(math.prod(shape) for shape in shapes) * (itemsize - BYTES[bits])
