"""LoRA: low-rank updates of a frozen language model's linear layers, W + scale · B A (arXiv 2106.09685).

Divided as the layer is: of a column-parallel one (qkv, fc1) A is whole on every tensor-parallel rank and B has its
rows; of a row-parallel one (proj, fc2) A has its columns and B is whole. Only the `rank` columns between A and B cross
the network. A whole matrix that sees a rank's share of the tokens (sequence parallelism) is marked, so that Megatron
adds its gradients up over the ranks: unmarked, the gradient is wrong and nothing says so.

T tokens of this rank, R rank of the update.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from vold.config.schema import AdapterConfig
from vold.models.adapter_dropout import Dropout, Share
from vold.models.architecture import Architecture, check_adapters
from vold.models.quantised import whole
from vold.models.vision import is_merger
from vold.parallel.launch import Layout

LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Target -> the layer's linear."""


@dataclass(frozen=True)
class Place:
    """Where an adapter joins the model.

    name     of its linear, the same on every layout
    parts    rows of the layer's local weight for each projection that it joins (q, k, v), each with an A and a B of its
             own
    join     their outputs, or weights, by projection -> in the order of the layer's rows, along a dimension that is
             counted from the end
    layout   this rank's
    dropout  the chunk's
    """

    name: str
    parts: Sequence[int]
    join: Callable[[list[Tensor], int], Tensor]
    layout: Layout
    dropout: Dropout


class Adapter(nn.Module):
    """The update of one linear layer; it joins the layer as `linear.adapter` and adds to its output.

    A plain linear layer (the vision tower's) is whole on every rank, and so are its A and B.
    """

    def __init__(self, linear: nn.Module, config: AdapterConfig, place: Place):
        super().__init__()
        self.scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        self._place, self._sp = place, place.layout.sp
        self._is_column = isinstance(linear, ColumnParallelLinear)
        self._is_row = isinstance(linear, RowParallelLinear)
        inputs, like = linear.weight.shape[1], {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.ParameterList(nn.Parameter(torch.empty(config.rank, inputs, **like)) for _ in place.parts)
        self.lora_B = nn.ParameterList(nn.Parameter(torch.empty(rows, config.rank, **like)) for rows in place.parts)
        divided = [*self.lora_B] * self._is_column + [*self.lora_A] * self._is_row
        for parameter in [*self.lora_A, *self.lora_B]:
            if any(parameter is other for other in divided):
                set_tensor_model_parallel_attributes(parameter, True, 0 if self._is_column else 1, 1)
            else:
                parameter.sequence_parallel = self._sp
        self.is_on = True
        linear.register_forward_hook(self._add_to_output)
        linear.weight.adapter = self

    def _add_to_output(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple):
        if not self.is_on:
            return output
        update = self(inputs[0])
        return output + update if isinstance(output, Tensor) else (output[0] + update, *output[1:])

    def forward(self, x_T1D: Tensor) -> Tensor:
        """What is added to the layer's output."""
        place, layout = self._place, self._place.layout
        share = Share(layout.tp, layout.tp_rank)
        rows = share if self._is_column and self._sp else Share()
        if self._is_column or self._is_row:
            rows = rows._replace(stripes=layout.cp, stripe=layout.cp_rank)
        columns = share if self._is_row else Share()
        low_T1R = [
            place.dropout.linear(x_T1D, A, f"{place.name} {number}", rows, columns)
            for number, A in enumerate(self.lora_A)
        ]
        low_T1R = self._across_ranks(torch.cat(low_T1R, dim=-1)).chunk(len(low_T1R), dim=-1)
        parts = [F.linear(low, B) for low, B in zip(low_T1R, self.lora_B, strict=True)]
        return self.scale * place.join(parts, -1)

    def _across_ranks(self, low: Tensor) -> Tensor:
        if self._is_column:
            across = gather_from_sequence_parallel_region if self._sp else copy_to_tensor_model_parallel_region
        elif self._is_row:
            across = (
                reduce_scatter_to_sequence_parallel_region if self._sp else reduce_from_tensor_model_parallel_region
            )
        else:
            return low
        return across(low)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the update added, summed in fp32 and rounded once."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        update = self._place.join([B.detach().float() @ A.detach().float() for A, B in pairs], -2)
        return (weight.detach().float() + self.scale * update).to(weight.dtype)


@contextmanager
def switched_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the chunks compute what their base does, in evaluation mode."""
    chunks = [*chunks]
    adapters = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]
    was_training = [chunk.training for chunk in chunks]
    for adapter in adapters:
        adapter.is_on = False
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def merged(parameter: nn.Parameter) -> Tensor:
    """A parameter as inference uses it: with its layer's update, where it has one."""
    adapter = getattr(parameter, "adapter", None)
    return whole(parameter) if adapter is None else adapter.merged(whole(parameter))


PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
}
"""Target -> the modules of transformers that it joins."""


VISUAL = ("merger", "tower")
"""Targets among the vision tower's linear layers: of its mergers, of its blocks."""


def check_targets(arch: Architecture, config: AdapterConfig) -> None:
    """Raises ValueError for an architecture that takes no adapters, or not those of config.targets."""
    check_adapters(arch, config.targets)
    if arch.mixture is not None and config.base_bits is not None:
        raise ValueError(
            f"adapter.base_bits = {config.base_bits} would leave the experts of {arch.model_type} whole; leave it out"
        )
    visual = [target for target in config.targets if target in VISUAL]
    if visual and arch.vision is None:
        raise ValueError(f"adapter.targets has {visual[0]}, but the student ({arch.model_type}) reads text only")


def add_adapters(
    layers: Sequence[nn.Module], config: AdapterConfig, joins: dict[str, Callable], layout: Layout, dropout: Dropout
) -> None:
    """Give the targets of `config` in every layer an adapter, with uninitialised weights. joins: target -> (local rows
    of each projection, join), see Place."""
    for layer in layers:
        for target in config.targets:
            if target in LINEARS:
                linear = layer.get_submodule(LINEARS[target])
                parts, join = joins[target](linear.weight.shape[0])
                place = Place(f"{layer.layer_number} {target}", parts, join, layout, dropout)
                linear.adapter = Adapter(linear, config, place)


def add_visual_adapters(visual: nn.Module, config: AdapterConfig, layout: Layout, dropout: Dropout) -> None:
    """Give the targets of `config` among the linear layers of a tower, or of its mergers, an adapter. Where ranks merge
    different tokens each draws masks of its own."""
    is_tower = any(name.startswith("blocks.") for name, _ in visual.named_modules())
    is_divided = (layout.sp or layout.cp > 1) and not is_tower
    rank = f" of rank {layout.cp_rank * layout.tp + layout.tp_rank}" if is_divided else ""
    for name, linear in [*visual.named_modules()]:
        if isinstance(linear, nn.Linear) and visual_target(name) in config.targets:
            place = Place(f"{name}{rank}", (linear.out_features,), _only, layout, dropout)
            linear.adapter = Adapter(linear, config, place)


def visual_target(name: str) -> str:
    """The target with a linear layer of the tower. name: without `visual.`"""
    return "merger" if is_merger(f"visual.{name}.") else "tower"


def _only(parts: list[Tensor], _dim: int) -> Tensor:
    return parts[0]


@torch.no_grad()
def initialise_matrix(name: str, parameter: nn.Parameter, split: int | None, tp: tuple[int, int], seed: int) -> None:
    """As peft does: A uniform within 1/sqrt(inputs), B zero, so that the model is unchanged. The values depend on the
    matrix's name and the seed alone, not on the layout. tp: (ranks, this rank)."""
    if ".lora_B." in name:
        parameter.zero_()
        return
    size, rank = tp if split is not None else (1, 0)
    rows, columns = parameter.shape[0], parameter.shape[1] * size
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
    parameter.copy_(values.chunk(size, dim=1)[rank])


def train_embeddings_output(embedding: nn.Module) -> None:
    """Let the embedding's output require a gradient though its weight is frozen: recomputed layers have none
    otherwise, and nothing says so."""

    def require(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    embedding.register_forward_hook(require)
