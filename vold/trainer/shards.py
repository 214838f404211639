"""A training state as named global tensors, independent of the layout it lives on.

A tensor is called `field/name`: `model/layers.3.mlp.up_proj.weight`, `exp_avg/...`, `exp_avg_sq/...`, `main/...`,
`average/...`, with transformers' names (vold.models.weight_rules). A rank holds an interval of one dimension of it
(tensor parallel) or all of it: it saves its intervals with their offsets, and at another tp, pp or dp it loads other
intervals. A rank holds one full tensor at a time, never the full model.

The files are safetensors with the offsets in the header, in the format of torch.distributed.checkpoint's
HuggingFaceStorageWriter, so that its reader reads them. Its writer would build a file's bytes in memory before writing
(twice the state), and its reader fills all of a rank's tensors at once, in full, where the distributed optimizer needs
a slice of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vold.models.language_model import LanguageModel
from vold.models.weight_rules import (
    EMBEDDING_RULE,
    HEAD_RULE,
    Rule,
    join_pieces,
    piece_shapes,
    sharing_of,
    split_pieces,
    trained_rules,
)
from vold.trainer.optimizer import (
    is_distributed,
    load_optimizer_state,
    optimizer_state,
    owned_range,
    state_fields,
)
from vold.trainer.weight_average import WeightAverage
from vold.untrusted import check_tensor_header

OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """An interval of a global tensor, which begins at `offset` of dimension `dim`."""

    tensor: Tensor
    dim: int = 0
    offset: int = 0


# Saving --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def snapshot(
    chunks: Sequence[LanguageModel], optimizer: MegatronOptimizer, average: WeightAverage | None = None
) -> dict[str, Piece]:
    """The pieces this rank writes, copied to the CPU. All ranks call it: a distributed optimizer's shares of a tensor
    are gathered on one rank of those that hold it, each in turn, so that replicas share the work of writing."""
    pieces: dict[str, Piece] = {}
    averaged = [average.fp32[parameter] for _, parameter, _ in _parameters(average.chunks)] if average else None
    for number, (chunk, parameter, rule) in enumerate(_parameters(chunks)):
        copies = chunk.layout.experts.dp_group if rule.experts else chunk.layout.replica_group
        writer = number % dist.get_world_size(copies)
        values = {"model": parameter.detach()} | {
            field: _gather(optimizer, parameter, share, writer, copies)
            for field, share in optimizer_state(optimizer, parameter).items()
        }
        values |= {"average": averaged[number]} if averaged else {}
        if dist.get_rank(copies) == writer and _is_first_copy(chunk, rule):
            for field, value in values.items():
                pieces |= _pieces(field, value.view(parameter.shape), rule, chunk)
    return pieces


def write_pieces(file: Path, pieces: dict[str, Piece]) -> None:
    """Write one safetensors file with every piece's offset in its header. Raises OSError, with the file's name, when
    the disk is full."""
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


def _gather(optimizer: MegatronOptimizer, parameter: nn.Parameter, share: Tensor, rank: int, group) -> Tensor:
    """The full flat state tensor on rank `rank` of the group; meaningless on the others."""
    if not is_distributed(optimizer):
        return share
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    full[owned_range(optimizer, parameter)] = share
    # Shares do not overlap, so a sum of the bit patterns joins them exactly.
    dist.reduce(full.view(torch.int32), dist.get_global_rank(group, rank), group=group)
    return full


def _pieces(field: str, value: Tensor, rule: Rule, chunk: LanguageModel) -> dict[str, Piece]:
    named = zip(rule.names, split_pieces(rule, value, chunk.arch), strict=True)
    dim, rank = rule.split or 0, sharing_of(rule, chunk.layout).rank
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
        for _name, parameter, rule in trained_rules(chunk):
            yield chunk, parameter, rule


# Loading -------------------------------------------------------------------------------------------------------------


class PieceReader:
    """Reads intervals of global tensors, joined from the pieces that the files hold. Opening it reads only headers. A
    context manager, which closes the files."""

    def __init__(self, files: Iterable[Path]):
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[list[int], Any]]] = {}
        for file in files:
            try:
                check_tensor_header(file)
                handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                offsets = json.loads((handle.metadata() or {}).get(OFFSETS, "{}"))
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    piece = ([int(start) for start in offsets[name]["saved_offsets"]], handle.get_slice(name))
                    self._pieces.setdefault(name, []).append(piece)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError):
                raise ValueError(f"{file} cannot be read: it has no offsets as vold writes them") from None

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_exception) -> None:
        self._pieces.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read(self, name: str, shape: Sequence[int], dim: int = 0, offset: int = 0) -> Tensor:
        """The block of `shape` that begins at `offset` of dimension `dim`. Raises ValueError when the files lack it."""
        parts, position, end = [], offset, offset + shape[dim]
        for offsets, lazy in sorted(self._pieces.get(name, ()), key=lambda piece: piece[0][dim]):
            size = lazy.get_shape()
            start, stop = offsets[dim], offsets[dim] + size[dim]
            if start <= position < min(stop, end):
                interval = slice(position - start, min(stop, end) - start)
                parts.append(lazy[interval] if dim == 0 else lazy[:, interval])
                position = min(stop, end)
        block = torch.cat(parts, dim) if parts else torch.empty(0)
        if block.shape != torch.Size(shape):
            raise ValueError(
                f"the checkpoint has no {name} of shape {tuple(shape)} at {offset} of dimension {dim}: it is of "
                "another model or dtype; resume with the run's own student and dtype"
            )
        return block

    def size(self, name: str, dim: int) -> int:
        """The global tensor's size in one dimension; 0 where the files lack it."""
        return max((o[dim] + lazy.get_shape()[dim] for o, lazy in self._pieces.get(name, ())), default=0)


@torch.no_grad()
def load_weights(chunks: Sequence[LanguageModel], reader: PieceReader) -> None:
    """Fill this rank's trained parameters, from a checkpoint of any layout."""
    for chunk, parameter, rule in _parameters(chunks):
        parameter.copy_(_read(reader, "model", parameter, rule, chunk))


def load_average(average: WeightAverage, reader: PieceReader) -> None:
    """Fill this rank's part of the student's average."""
    for chunk, parameter, rule in _parameters(average.chunks):
        average.set(parameter, _read(reader, "average", parameter, rule, chunk))


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
    """This rank's share of one field, of the parameter's shape. Raises ValueError where the global tensor has another
    size, which is another model's."""
    if rule == HEAD_RULE and chunk.arch.tied:  # the last of several pipeline stages keeps its own copy
        rule = EMBEDDING_RULE
    dim, pieces = rule.split or 0, []
    sharing = sharing_of(rule, chunk.layout)
    for name, shape in zip(rule.names, piece_shapes(rule, parameter.shape, chunk.arch, chunk.layout), strict=True):
        key, size = f"{field}/{name}", shape[dim] // sharing.ranks
        if key in reader and reader.size(key, dim) != shape[dim]:
            raise ValueError(
                f"the checkpoint's {key} is {reader.size(key, dim)} long in dimension {dim}, the model's {shape[dim]}: "
                "it is of another model; resume with the run's own student"
            )
        pieces.append(reader.read(key, [*shape[:dim], size, *shape[dim + 1 :]], dim, sharing.rank * size))
    return join_pieces(rule, pieces, chunk.arch)


# Random numbers ------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Piece]:
    """The states of this rank's generators. No step draws from them today (no dropout; rollouts and data order are
    seeded by step), so they are restored at the same layout only."""
    states = {"torch": torch.get_rng_state(), **_megatron_generators().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{dist.get_rank()}/{name}": Piece(state.clone()) for name, state in states.items()}


def load_random_state(reader: PieceReader) -> None:
    """Restore this rank's generators to a saved `random_state`."""
    saved = {name: reader.read(name, piece.tensor.shape) for name, piece in random_state().items()}
    states = {name.rpartition("/")[2]: state for name, state in saved.items()}
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    _megatron_generators().set_states(states)


def _megatron_generators():
    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "vold.parallel.launch.initialise seeds it"
    return tracker
