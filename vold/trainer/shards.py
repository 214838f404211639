"""A training state as named global tensors, independent of the layout it lives on.

A tensor is `field/name`: `model/layers.3.mlp.up_proj.weight`, `exp_avg/...`, `exp_avg_sq/...`, `main/...`, where name
is transformers' (the table of vold.models.weights). A rank holds an interval of one dimension of it (tensor parallel)
or all of it, so saving is writing one's intervals with their offsets, and loading at another tp, pp or dp is reading
other intervals. One tensor at a time is whole on one rank, never the model.

The files are safetensors with the offsets in the header, as torch.distributed.checkpoint's HuggingFaceStorageWriter
writes them, and its reader reads them. Why not its writer and reader themselves: the writer builds a file's bytes in
memory before writing (twice the state), and the reader fills all of a rank's tensors at once, in full, where the
distributed optimizer needs a slice of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vold.models.language_model import LanguageModel
from vold.models.weights import EMBEDDING_RULE, HEAD_RULE, Rule, join_pieces, named_rules, piece_shapes, split_pieces
from vold.trainer.optimizer import (
    is_distributed,
    load_optimizer_state,
    optimizer_state,
    owned_range,
    state_fields,
)
from vold.trainer.weight_average import WeightAverage

OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """An interval of a global tensor: `tensor` begins at `offset` of dimension `dim`."""

    tensor: Tensor
    dim: int = 0
    offset: int = 0


# Saving --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def snapshot(
    chunks: Sequence[LanguageModel], optimizer: MegatronOptimizer, average: WeightAverage | None = None
) -> dict[str, Piece]:
    """The pieces this rank writes, copied to the CPU. All ranks call it: a distributed optimizer's shares of a tensor
    are brought together on one data-parallel rank, each rank in turn, so replicas share the work of writing."""
    layout = chunks[0].layout
    pieces: dict[str, Piece] = {}
    averaged = [average.exact[parameter] for _, parameter, _ in _parameters(average.chunks)] if average else None
    for number, (chunk, parameter, rule) in enumerate(_parameters(chunks)):
        writer = number % layout.dp
        values = {"model": parameter.detach()} | {
            field: _gather(optimizer, parameter, part, writer, layout.dp_group)
            for field, part in optimizer_state(optimizer, parameter).items()
        }
        values |= {"average": averaged[number]} if averaged else {}
        if layout.dp_rank == writer and _is_first_copy(chunk, rule):
            for field, value in values.items():
                pieces |= _pieces(field, value.view(parameter.shape), rule, chunk)
    return pieces


def write_pieces(file: Path, pieces: dict[str, Piece]) -> None:
    """One safetensors file with every piece's offset in its header. Raises OSError, with the file's name, when full."""
    offsets = {}
    for name, piece in pieces.items():
        offset = [0] * piece.tensor.dim()
        if offset:
            offset[piece.dim] = piece.offset
        offsets[name] = {"saved_offsets": offset}
    try:
        save_file({n: p.tensor for n, p in pieces.items()}, file, metadata={OFFSETS: json.dumps(offsets)})
    except SafetensorError as error:  # how it reports what the file system said
        raise OSError(f"{file}: {error}") from None


def _gather(optimizer: MegatronOptimizer, parameter: nn.Parameter, part: Tensor, to: int, group) -> Tensor:
    """The whole flat state tensor on data-parallel rank `to`; meaningless on the others."""
    if not is_distributed(optimizer):
        return part
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    whole[owned_range(optimizer, parameter)] = part
    # Shares do not overlap, so a sum of the bit patterns puts them side by side exactly.
    dist.reduce(whole.view(torch.int32), dist.get_global_rank(group, to), group=group)
    return whole


def _pieces(field: str, value: Tensor, rule: Rule, chunk: LanguageModel) -> dict[str, Piece]:
    named = zip(rule.names, split_pieces(rule, value, chunk.arch), strict=True)
    dim, rank = rule.split or 0, 0 if rule.split is None else chunk.layout.tp_rank
    return {
        # a copy: training goes on while an asynchronous save writes
        f"{field}/{name}": Piece(piece.to("cpu", copy=True).contiguous(), dim, rank * piece.shape[dim])
        for name, piece in named
    }


def _is_first_copy(chunk: LanguageModel, rule: Rule) -> bool:
    """Not a tensor-parallel replica, and not the last stage's copy of a tied embedding."""
    return (rule.split is not None or chunk.layout.tp_rank == 0) and not (rule == HEAD_RULE and chunk.arch.tied)


def _parameters(chunks: Iterable[LanguageModel]) -> Iterator[tuple[LanguageModel, nn.Parameter, Rule]]:
    for chunk in chunks:
        for _name, parameter, rule in named_rules(chunk):
            yield chunk, parameter, rule


# Loading -------------------------------------------------------------------------------------------------------------


class PieceReader:
    """Intervals of global tensors, put together from whatever pieces the files hold. Lazy: only headers are read."""

    def __init__(self, files: Iterable[Path]):
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[list[int], object]]] = {}
        for file in files:
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
            offsets = json.loads((handle.metadata() or {}).get(OFFSETS, "{}"))
            for name in handle.keys():  # noqa: SIM118 - not a dict
                found = (offsets[name]["saved_offsets"], handle.get_slice(name))
                self._pieces.setdefault(name, []).append(found)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_exception) -> None:
        self._pieces.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read(self, name: str, shape: Sequence[int], dim: int = 0, offset: int = 0) -> Tensor:
        """The block of `shape` that begins at `offset` of dimension `dim`. Raises ValueError when it is not there."""
        found, position, end = [], offset, offset + shape[dim]
        for offsets, lazy in sorted(self._pieces.get(name, ()), key=lambda piece: piece[0][dim]):
            size = lazy.get_shape()
            start, stop = offsets[dim], offsets[dim] + size[dim]
            if start <= position < min(stop, end):
                part = slice(position - start, min(stop, end) - start)
                found.append(lazy[part] if dim == 0 else lazy[:, part])
                position = min(stop, end)
        block = torch.cat(found, dim) if found else torch.empty(0)
        if block.shape != torch.Size(shape):
            raise ValueError(
                f"the checkpoint has no {name} of shape {tuple(shape)} at {offset} of dimension {dim}: it is of "
                "another model or dtype; resume with the run's own student and dtype"
            )
        return block

    def size(self, name: str, dim: int) -> int:
        """The global tensor's extent."""
        return max((o[dim] + lazy.get_shape()[dim] for o, lazy in self._pieces.get(name, ())), default=0)


@torch.no_grad()
def load_weights(chunks: Sequence[LanguageModel], reader: PieceReader) -> None:
    """Fill this rank's parameters, whatever layout they were saved from."""
    for chunk, parameter, rule in _parameters(chunks):
        parameter.copy_(_read(reader, "model", parameter, rule, chunk))


def load_average(average: WeightAverage, reader: PieceReader) -> None:
    """Fill this rank's part of the student's average."""
    for chunk, parameter, rule in _parameters(average.chunks):
        average.put(parameter, _read(reader, "average", parameter, rule, chunk))


@torch.no_grad()
def load_optimizer(
    chunks: Sequence[LanguageModel], optimizer: MegatronOptimizer, reader: PieceReader, updates: int
) -> None:
    """Fill this rank's share of Adam's state; call after `load_weights`."""
    for chunk, parameter, rule in _parameters(chunks):
        share = owned_range(optimizer, parameter)
        if share.stop > share.start:
            values = {
                field: _read(reader, field, parameter, rule, chunk).flatten()[share]
                for field in state_fields(parameter)
            }
            load_optimizer_state(optimizer, parameter, values, updates)


def _read(reader: PieceReader, field: str, parameter: nn.Parameter, rule: Rule, chunk: LanguageModel) -> Tensor:
    """This rank's [parameter.shape] of one field. A global tensor of another size is another model's: refused."""
    if rule == HEAD_RULE and chunk.arch.tied:  # the last of several pipeline stages keeps its own copy
        rule = EMBEDDING_RULE
    dim, pieces = rule.split or 0, []
    parts, rank = (1, 0) if rule.split is None else (chunk.layout.tp, chunk.layout.tp_rank)
    for name, shape in zip(rule.names, piece_shapes(rule, parameter.shape, chunk.arch, chunk.layout.tp), strict=True):
        key, size = f"{field}/{name}", shape[dim] // parts
        if key in reader and reader.size(key, dim) != shape[dim]:
            raise ValueError(
                f"the checkpoint's {key} is {reader.size(key, dim)} long in dimension {dim}, the model's {shape[dim]}: "
                "it is of another model; resume with the run's own student"
            )
        pieces.append(reader.read(key, [*shape[:dim], size, *shape[dim + 1 :]], dim, rank * size))
    return join_pieces(rule, pieces, chunk.arch)


# Random numbers ------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Piece]:
    """This rank's generators. Nothing in a step draws from them today (no dropout; rollouts and data order are seeded
    by step), so they are restored at the same layout only."""
    states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{dist.get_rank()}/{name}": Piece(state.clone()) for name, state in states.items()}


def load_random_state(reader: PieceReader) -> None:
    """Restore what `random_state` took on this rank."""
    read = {name: reader.read(name, piece.tensor.shape) for name, piece in random_state().items()}
    states = {name.rpartition("/")[2]: state for name, state in read.items()}
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states(states)
