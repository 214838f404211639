"""Weights from Hugging Face checkpoints into the Megatron model and back, exactly, by the rules of
vold.models.weight_rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vold.config.schema import AdapterConfig
from vold.models.adapters import initialise_matrix, merged
from vold.models.architecture import Architecture
from vold.models.checkpoint_reader import CheckpointReader
from vold.models.joined import EXPERT_TENSORS, join_stream
from vold.models.language_model import LanguageModel
from vold.models.peft_directory import adapter_tensors, check_matrix
from vold.models.weight_rules import (
    EMBEDDING_RULE,
    HEAD_RULE,
    Rule,
    Sharing,
    is_adapter,
    join_pieces,
    named_rules,
    piece_shapes,
    sharing_of,
    split_pieces,
    tensor_pieces,
)
from vold.parallel.launch import Layout

# Loading -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_pretrained(chunk: LanguageModel, checkpoint_dir: str | Path) -> None:
    """Fill every parameter of a chunk from a Hugging Face checkpoint directory, reading only this tp rank's share.

    Raises ValueError naming the tensor and the file when one is missing, has another shape, or would be left out.
    """
    if chunk.adapter is not None:
        _load_adapters(chunk, chunk.adapter)
    with CheckpointReader(checkpoint_dir) as reader:
        reader.check_names(chunk.arch)
        for _name, parameter, rule in named_rules(chunk):
            if is_adapter(rule):
                continue
            if rule == HEAD_RULE and chunk.arch.tied:  # the last of several pipeline stages keeps its own copy
                rule = EMBEDDING_RULE
            shapes = piece_shapes(rule, parameter.shape, chunk.arch, chunk.layout)
            names = zip(rule.names, shapes, strict=True)
            sharing = sharing_of(rule, chunk.layout)
            pieces = [_read_share(reader, name, shape, rule.split, sharing) for name, shape in names]
            parameter.copy_(join_pieces(rule, pieces, chunk.arch))


def _load_adapters(chunk: LanguageModel, config: AdapterConfig) -> None:
    """Fill a chunk's adapters: new ones, or those of config.path."""
    tp = (chunk.layout.tp, chunk.layout.tp_rank)
    matrices = ((parameter, rule.names[0], rule.split) for _, parameter, rule in named_rules(chunk) if is_adapter(rule))
    if config.path is None:
        for parameter, name, split in matrices:
            initialise_matrix(name, parameter, split, tp, config.seed)
        return
    with adapter_tensors(config) as stored:
        for parameter, name, split in matrices:
            full_name = f"base_model.model.{_long_name(name, chunk.arch)}"
            shape = tuple(size * (tp[0] if dim == split else 1) for dim, size in enumerate(parameter.shape))
            value = check_matrix(stored, full_name, shape, config)
            parameter.copy_(value if split is None else value.chunk(tp[0], split)[tp[1]])


def _read_share(reader: CheckpointReader, name: str, shape: tuple[int, ...], split: int | None, sharing: Sharing):
    reader.check_shape(name, shape)
    stored = reader.slice(name)
    if split is None or sharing.ranks == 1:
        return _finite(stored[:], name, reader)
    rows = shape[split] // sharing.ranks
    share = slice(sharing.rank * rows, (sharing.rank + 1) * rows)
    return _finite(stored[share] if split == 0 else stored[:, share], name, reader)


def _finite(tensor: Tensor, name: str, reader: CheckpointReader) -> Tensor:
    """The tensor. Raises ValueError naming it and its file where it holds NaN or infinities."""
    if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
        raise ValueError(f"{reader.where(name)} holds NaN or infinite values; take a checkpoint from before they arose")
    return tensor


# Exporting -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_weights(
    chunks: Sequence[LanguageModel], value: Callable[[nn.Parameter], Tensor] = merged
) -> Iterator[tuple[str, Tensor]]:
    """Stream (Hugging Face name, full tensor) of the language model and trained mergers, with the names transformers
    writes today; adapters are merged into the weights that they change.

    Every rank of a model copy (where copies share experts, of all of them) must iterate, one tensor at a time: shares
    are gathered over the tp group, then sent from the stage that holds them to the others. The experts of a mixture are
    in one tensor, as transformers has them in memory. The stream of a tied model also carries lm_head.weight, because a
    sampler that is updated in place goes silently wrong without it. At tp = pp = ep = etp = 1 the tensors are views of
    the live parameters: use or copy them before the next optimiser step. value: the tensor to export for a parameter,
    of its shape (its gradient, say).
    """
    arch, layout = chunks[0].arch, chunks[0].layout
    for name, tensor in join_stream(_from_all_stages(_lazy_tensors(chunks, value, of_adapters=False), layout), arch):
        yield _long_name(name, arch), tensor
        if arch.tied and name == "embed_tokens.weight":
            yield "lm_head.weight", tensor


@torch.no_grad()
def export_adapters(
    chunks: Sequence[LanguageModel], value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name as peft writes it, full tensor) of the adapters, as `export_weights` does."""
    for name, tensor in _from_all_stages(_lazy_tensors(chunks, value, of_adapters=True), chunks[0].layout):
        yield f"base_model.model.{_long_name(name, chunks[0].arch)}", tensor


def _long_name(name: str, arch: Architecture) -> str:
    if name == "lm_head.weight":
        return name
    in_language_model = arch.vision is not None and not name.startswith("visual.")
    return f"model.language_model.{name}" if in_language_model else f"model.{name}"


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that this rank's stage holds; `gather()` brings the full one together over the tp group."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]


def _lazy_tensors(
    chunks: Sequence[LanguageModel], value: Callable[[nn.Parameter], Tensor], *, of_adapters: bool
) -> Iterator[_LazyTensor]:
    for name, shape, index, parameter, rule in tensor_pieces(chunks):
        if is_adapter(rule) != of_adapters or (rule.experts and index):
            continue
        if rule.experts:
            yield _lazy_experts(parameter, rule, partial(value, parameter), chunks[0])
            continue
        gather = partial(_gather_piece, rule, partial(value, parameter), index, chunks[0])
        dtype = parameter.dtype if value is merged else value(parameter).dtype
        yield _LazyTensor(name, shape, dtype, gather)


def _lazy_experts(
    parameter: nn.Parameter, rule: Rule, value: Callable[[], Tensor], chunk: LanguageModel
) -> _LazyTensor:
    """All experts' matrices as the one tensor that transformers has in memory."""
    prefix = rule.names[0].partition(".mlp.experts.")[0]
    count, rows, columns = parameter.shape
    experts = chunk.layout.experts
    shape = [count * experts.ep, rows, columns]
    shape[1 + rule.split] *= experts.etp
    name = f"{prefix}.{EXPERT_TENSORS[len(rule.names) // rule.experts]}"
    return _LazyTensor(name, tuple(shape), value().dtype, partial(_gather_experts, rule, value, chunk.layout))


def _gather_experts(rule: Rule, value: Callable[[], Tensor], layout: Layout) -> Tensor:
    """[experts of all ep ranks, rows, columns], of each expert the parts of all etp ranks."""
    local, experts = value(), layout.experts
    parts = _all_gather(local, experts.etp_group)
    if rule.join == "gated":
        halves = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        whole = local if len(parts) == 1 else torch.cat([part for half in halves for part in half], dim=1)
    else:
        whole = torch.cat(parts, dim=1 + (rule.split or 0)) if len(parts) > 1 else local
    gathered = _all_gather(whole, experts.ep_group)
    return torch.cat(gathered) if len(gathered) > 1 else whole


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    shares = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shares, tensor.contiguous(), group=group)
    return shares


def _gather_piece(rule: Rule, value: Callable[[], Tensor], index: int, chunk: LanguageModel) -> Tensor:
    """The full Hugging Face tensor number `index` of a rule, from this tp rank's share of the parameter's value."""
    piece = split_pieces(rule, value(), chunk.arch)[index]
    if rule.split is None or chunk.layout.tp == 1:
        return piece
    return torch.cat(_all_gather(piece, chunk.layout.tp_group), dim=rule.split)


def _from_all_stages(local: Iterator[_LazyTensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every stage's tensors on every stage: names, shapes and dtypes are exchanged once, then the tensors follow one by
    one."""
    if layout.pp == 1:
        yield from ((lazy.name, lazy.gather()) for lazy in local)
        return
    tensors = list(local)
    tables: list = [None] * layout.pp
    dist.all_gather_object(tables, [(t.name, t.shape, t.dtype) for t in tensors], group=layout.pp_group)
    for stage, table in enumerate(tables):
        source = dist.get_global_rank(layout.pp_group, stage)
        for index, (name, shape, dtype) in enumerate(table):
            if stage == layout.pp_rank:
                tensor = tensors[index].gather().contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=layout.device)
            dist.broadcast(tensor, src=source, group=layout.pp_group)
            yield name, tensor
