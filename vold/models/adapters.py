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
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vold.config.schema import AdapterConfig
from vold.io import to_json
from vold.models.checkpoint_dir import new_checkpoint
from vold.untrusted import check_tensor_header, read_json

LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Target -> the layer's linear."""


class Adapter(nn.Module):
    """The update of one linear layer; it joins the layer as `linear.adapter` and adds to its output.

    parts: rows of the layer's local weight for each projection that it joins (q, k, v), each with an A and a B of its
    own. join: their outputs, or weights, by projection -> in the order of the layer's rows, along a dimension that
    is counted from the end.
    """

    def __init__(
        self,
        linear: nn.Module,
        config: AdapterConfig,
        parts: Sequence[int],
        join: Callable[[list[Tensor], int], Tensor],
    ):
        super().__init__()
        self.scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        self._join, self._sp = join, linear.sequence_parallel
        self._is_column = isinstance(linear, ColumnParallelLinear)
        inputs, like = linear.weight.shape[1], {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.ParameterList(nn.Parameter(torch.empty(config.rank, inputs, **like)) for _ in parts)
        self.lora_B = nn.ParameterList(nn.Parameter(torch.empty(rows, config.rank, **like)) for rows in parts)
        whole, divided = (self.lora_A, self.lora_B) if self._is_column else (self.lora_B, self.lora_A)
        for parameter in whole:
            parameter.sequence_parallel = self._sp
        for parameter in divided:
            set_tensor_model_parallel_attributes(parameter, True, 0 if self._is_column else 1, 1)
        self.is_on = True
        linear.register_forward_hook(self._add_to_output)
        linear.weight.adapter = self

    def _add_to_output(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
        return (output[0] + self(inputs[0]), *output[1:]) if self.is_on else output

    def forward(self, x_T1D: Tensor) -> Tensor:
        """What is added to the layer's output."""
        low_T1R = [F.linear(x_T1D, A) for A in self.lora_A]
        low_T1R = self._across_ranks(torch.cat(low_T1R, dim=-1)).chunk(len(low_T1R), dim=-1)
        parts = [F.linear(low, B) for low, B in zip(low_T1R, self.lora_B, strict=True)]
        return self.scale * self._join(parts, -1)

    def _across_ranks(self, low: Tensor) -> Tensor:
        if self._is_column:
            across = gather_from_sequence_parallel_region if self._sp else copy_to_tensor_model_parallel_region
        else:
            across = (
                reduce_scatter_to_sequence_parallel_region if self._sp else reduce_from_tensor_model_parallel_region
            )
        return across(low)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the update added, summed in fp32 and rounded once."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        update = self._join([B.detach().float() @ A.detach().float() for A, B in pairs], -2)
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
    return parameter.detach() if adapter is None else adapter.merged(parameter)


def add_adapters(layers: Sequence[nn.Module], config: AdapterConfig, joins: dict[str, Callable]) -> None:
    """Give the targets of `config` in every layer an adapter, with uninitialised weights. joins: target -> (local rows
    of each projection, join), see Adapter."""
    for layer in layers:
        for target in config.targets:
            linear = layer.get_submodule(LINEARS[target])
            linear.adapter = Adapter(linear, config, *joins[target](linear.weight.shape[0]))


PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
}
"""Target -> the modules of transformers that it joins."""


def write_adapter(out: Path, base: Path, config: AdapterConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a directory as peft does. base: the checkpoint that the adapter belongs to. tensors: by peft's names. A
    vision tower, whose modules have the same names, is left out of it."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rslora,
        "target_modules": [name for target in config.targets for name in PROJECTIONS[target]],
        "exclude_modules": r"(.*\.)?visual\..*",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if config.alpha.is_integer():
        settings["lora_alpha"] = int(config.alpha)  # as peft writes it; vLLM's key is an integer
    with new_checkpoint(out) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text(to_json(settings, indent=2))


@contextmanager
def adapter_tensors(config: AdapterConfig) -> Iterator[safe_open]:
    """The opened tensors of config.path. Raises ValueError where its adapter is not the one that `config` describes."""
    assert config.path is not None
    settings = read_json(config.path / "adapter_config.json")
    modules = sorted(name for target in config.targets for name in PROJECTIONS[target])
    stored = {
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "rslora": bool(settings.get("use_rslora")),
        "targets": sorted(settings.get("target_modules") or ()),
    }
    for key, value in {**config.model_dump(include={"rank", "alpha", "rslora"}), "targets": modules}.items():
        if stored[key] != value:
            raise ValueError(f"adapter.{key} is {value}, but {config.path} has {stored[key]}; make them equal")
    if unknown := [
        key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if settings.get(key)
    ]:
        raise ValueError(f"adapter.path = {config.path} has {unknown[0]}, which is not supported; merge it with peft")
    file = config.path / "adapter_model.safetensors"
    check_tensor_header(file)
    with safe_open(file, framework="pt", device="cpu") as tensors:
        yield tensors


def check_matrix(stored: safe_open, name: str, shape: tuple[int, ...], config: AdapterConfig) -> Tensor:
    """A tensor of an adapter's file. Raises ValueError where it is missing or has another shape."""
    if name not in stored.keys():  # noqa: SIM118 - not a dict
        raise ValueError(f"adapter.path = {config.path} has no {name}: it is of another model")
    if tuple(stored.get_slice(name).get_shape()) != shape:
        found = tuple(stored.get_slice(name).get_shape())
        raise ValueError(f"adapter.path = {config.path}: {name} has shape {found}, the model's is {shape}")
    return stored.get_tensor(name)


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
