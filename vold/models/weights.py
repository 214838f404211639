"""Names and layouts of weights in Hugging Face checkpoints and in the Megatron model, converted exactly both ways.

One Megatron parameter is one or several Hugging Face tensors, joined by a `Rule`. The same table loads and exports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vold.config.schema import AdapterConfig
from vold.models import flops
from vold.models.adapters import LINEARS, initialise_matrix, merged, train_embeddings_output, visual_target
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import open_tensors, reading, short_name, tensor_files
from vold.models.joined import EXPERT_TENSORS, join_stream, joining_architecture, parts_of
from vold.models.language_model import LanguageModel, build_chunks
from vold.models.peft_directory import adapter_tensors, check_matrix
from vold.models.quantised import open_bitsandbytes, quantise
from vold.models.selection import check_patterns, first_match, takes_mergers, takes_tower, trained_patterns
from vold.models.vision import tower_linears, tower_tensors
from vold.parallel.launch import Layout

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
VISUAL_ADAPTER = re.compile(r"\.adapter\.lora_([AB])\.0$")
STORED_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names; anything else needs scales that are not read
NOT_WEIGHTS = "rotary_emb.inv_freq"  # a buffer that old checkpoints stored; transformers leaves it out too


@dataclass(frozen=True)
class Rule:
    """The assembly of a Megatron parameter from Hugging Face tensors.

    names    relative to the layer or to the model
    join     "single": the tensor itself; "qkv": for each group its queries, key, value; "gated": gate rows, then up's
    split    the dimension divided over the tp group, or None when replicated
    experts  of a mixture: the parameter has one such matrix for each of so many experts, and the names of all; `split`
             over the etp group
    """

    names: tuple[str, ...]
    join: str = "single"
    split: int | None = None
    experts: int = 0

    def of_experts(self, numbers: Iterable[int]) -> Rule:
        """The rule of some experts, from that of one in LAYER_RULES."""
        names = [name.format(number) for number in numbers for name in self.names]
        return replace(self, names=tuple(names), experts=len(names) // len(self.names))

    @property
    def one(self) -> Rule:
        """Of each expert: the rule of its matrix."""
        return replace(self, names=self.names[: len(self.names) // max(self.experts, 1)], experts=0)


LAYER_RULES = {
    "input_layernorm.weight": Rule(("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule(("post_attention_layernorm.weight",)),
    "self_attention.q_layernorm.weight": Rule(("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule(("self_attn.k_norm.weight",)),
    "self_attention.linear_qkv.weight": Rule(tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv", 0),
    "self_attention.linear_qkv.bias": Rule(tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv", 0),
    "self_attention.linear_proj.weight": Rule(("self_attn.o_proj.weight",), split=1),
    "mlp.linear_fc1.weight": Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated", 0),
    "mlp.linear_fc2.weight": Rule(("mlp.down_proj.weight",), split=1),
    "mlp.router.weight": Rule(("mlp.gate.weight",)),
    "mlp.experts.fc1": Rule(("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), "gated", 0, 1),
    "mlp.experts.fc2": Rule(("mlp.experts.{}.down_proj.weight",), split=1, experts=1),
}


def _adapter_rules() -> dict[str, Rule]:
    """Of each projection's A and B: B has the rows of a weight that is divided by rows, A the columns of the others."""
    rules = {}
    for target in LINEARS.values():
        rule = LAYER_RULES[f"{target}.weight"]
        for index, name in enumerate(rule.names):
            for letter, split in (("A", None if rule.split == 0 else 1), ("B", 0 if rule.split == 0 else None)):
                stored = name.replace(".weight", f".lora_{letter}.weight")
                rules[f"{target}.adapter.lora_{letter}.{index}"] = Rule((stored,), split=split)
    return rules


ADAPTER_RULES = _adapter_rules()
EMBEDDING_RULE = Rule(("embed_tokens.weight",), split=0)
HEAD_RULE = Rule(("lm_head.weight",), split=0)
MODEL_RULES = {
    "embedding.word_embeddings.weight": EMBEDDING_RULE,
    "decoder.final_layernorm.weight": Rule(("norm.weight",)),
    "output_layer.weight": HEAD_RULE,
}


def layer_rules(arch: Architecture) -> dict[str, Rule]:
    """The rules of one layer's parameters, undivided."""
    absent = {"self_attention.linear_qkv.bias"} if not arch.qkv_bias else set()
    if not arch.qk_norm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    if arch.mixture is None:
        absent |= {"mlp.router.weight", "mlp.experts.fc1", "mlp.experts.fc2"}
    else:
        absent |= {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    experts = range(arch.mixture.experts if arch.mixture else 0)
    rules = {key: rule for key, rule in LAYER_RULES.items() if key not in absent}
    return {key: rule.of_experts(experts) if rule.experts else rule for key, rule in rules.items()}


def text_tensors(arch: Architecture) -> set[str]:
    """Short names of the tensors that a language model of this architecture reads."""
    names = [name for rule in layer_rules(arch).values() for name in rule.names]
    of_layers = {f"layers.{layer}.{name}" for layer in range(arch.layers) for name in names}
    return of_layers | {name for rule in MODEL_RULES.values() for name in rule.names}


def named_rules(model: LanguageModel) -> Iterator[tuple[str, nn.Parameter, Rule]]:
    """Every parameter of this chunk with its rule, whose names have the global layer number."""
    for name, parameter in model.named_parameters():
        match = LAYER.fullmatch(name)
        if match is None:  # mergers have their checkpoint names
            yield name, parameter, _visual_rule(name) if name.startswith("visual.") else MODEL_RULES[name]
            continue
        layer = model.decoder.layers[int(match[1])].layer_number - 1
        rule = LAYER_RULES.get(match[2]) or ADAPTER_RULES[match[2]]
        if rule.experts:
            first = model.layout.experts.ep_rank * len(parameter)
            rule = rule.of_experts(range(first, first + len(parameter)))
        yield name, parameter, replace(rule, names=tuple(f"layers.{layer}.{n}" for n in rule.names))


def _visual_rule(name: str) -> Rule:
    return Rule((VISUAL_ADAPTER.sub(r".lora_\1.weight", name),))


def trained_rules(model: LanguageModel) -> Iterator[tuple[str, nn.Parameter, Rule]]:
    """`named_rules` of what is trained (see build_student)."""
    for name, parameter, rule in named_rules(model):
        if name in model.trained:
            yield name, parameter, rule


def is_adapter(rule: Rule) -> bool:
    return ".lora_" in rule.names[0]


@dataclass(frozen=True)
class Sharing:
    """The ranks that a parameter's matrices are divided over: their number, this rank's, their group."""

    ranks: int
    rank: int
    group: dist.ProcessGroup


def sharing_of(rule: Rule, layout: Layout) -> Sharing:
    """Of a parameter that is not divided: this rank alone, in the tp group."""
    if rule.split is None:
        return Sharing(1, 0, layout.tp_group)
    if rule.experts:
        return Sharing(layout.experts.etp, layout.experts.etp_rank, layout.experts.etp_group)
    return Sharing(layout.tp, layout.tp_rank, layout.tp_group)


# Shapes of the pieces ------------------------------------------------------------------------------------------------


def piece_shapes(rule: Rule, shape: Sequence[int], arch: Architecture, layout: Layout) -> list[tuple[int, ...]]:
    """Full (unsharded) shapes of the Hugging Face tensors behind a parameter whose local shape is `shape`."""
    ranks = sharing_of(rule, layout).ranks
    if rule.experts:
        return _full_shapes(rule.one, shape[1:], arch, ranks) * rule.experts
    return _full_shapes(rule, shape, arch, ranks)


def _full_shapes(rule: Rule, shape: Sequence[int], arch: Architecture, ranks: int) -> list[tuple[int, ...]]:
    full = list(shape)
    if rule.split is not None:
        full[rule.split] *= ranks
    if rule.join == "single":
        return [tuple(full)]
    if rule.join == "gated":
        return [(full[0] // 2, *full[1:])] * 2
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return [(query, *full[1:]), (key, *full[1:]), (key, *full[1:])]


def join_pieces(rule: Rule, pieces: list[Tensor], arch: Architecture) -> Tensor:
    """Hugging Face tensors (a tp share of each) -> the Megatron parameter."""
    if rule.experts:
        count = len(rule.names) // rule.experts
        return torch.stack([join_pieces(rule.one, pieces[i : i + count], arch) for i in range(0, len(pieces), count)])
    if rule.join == "single":
        return pieces[0]
    if rule.join == "gated":
        return torch.cat(pieces)
    per_group = [x.unflatten(0, (-1, rows)) for x, rows in zip(pieces, _group_rows(arch), strict=True)]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def split_pieces(rule: Rule, parameter: Tensor, arch: Architecture) -> list[Tensor]:
    """The Megatron parameter -> the same share of each Hugging Face tensor; inverse of `join_pieces`."""
    if rule.experts:
        return [piece for matrix in parameter for piece in split_pieces(rule.one, matrix, arch)]
    if rule.join == "single":
        return [parameter]
    if rule.join == "gated":
        return list(parameter.chunk(2))
    rows = _group_rows(arch)
    return [x.flatten(0, 1) for x in parameter.unflatten(0, (-1, sum(rows))).split(rows, dim=1)]


def _group_rows(arch: Architecture) -> list[int]:
    return [arch.heads // arch.kv_heads * arch.head_dim, arch.head_dim, arch.head_dim]


def tensor_shapes(chunks: Sequence[LanguageModel]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """For every Hugging Face tensor in these chunks, adapters left out: short name, full shape, number of its elements
    that they hold. A tied head counts with its embedding."""
    for name, shape, _, _, rule in _tensor_pieces(chunks):
        if is_adapter(rule):
            continue
        yield name, shape, math.prod(shape) // sharing_of(rule, chunks[0].layout).ranks


def _tensor_pieces(
    chunks: Sequence[LanguageModel],
) -> Iterator[tuple[str, tuple[int, ...], int, nn.Parameter, Rule]]:
    """For every Hugging Face tensor in these chunks: short name, full shape, index among the rule's names, parameter,
    rule."""
    for chunk in chunks:
        for _name, parameter, rule in named_rules(chunk):
            if rule == HEAD_RULE and chunk.arch.tied:  # the last stage's copy of the embedding
                continue
            shapes = piece_shapes(rule, parameter.shape, chunk.arch, chunk.layout)
            for index, (name, shape) in enumerate(zip(rule.names, shapes, strict=True)):
                yield name, shape, index, parameter, rule


# Loading -------------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Tensors of a checkpoint directory by their short name, whichever spelling the files use. A context manager, which
    closes the files."""

    def __init__(self, checkpoint_dir: str | Path):
        self.dir = Path(checkpoint_dir)
        self._file_of = tensor_files(self.dir)
        self._full_name = {short_name(name): name for name in self._file_of}
        self._part_of: dict[str, Callable[[Any], Any]] = {}  # of a part of a joined tensor: from the tensor's slice
        if (arch := joining_architecture(self.dir)) is not None:
            for name in list(self._full_name):
                if parts := parts_of(name, arch):
                    full_name = self._full_name.pop(name)
                    self._full_name |= dict.fromkeys(parts, full_name)
                    self._part_of |= parts
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_exception) -> None:
        self._handles.clear()
        self._open_files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._full_name

    def slice(self, name: str):
        """A lazily read safetensors slice. Raises ValueError naming the tensor and the directory when missing."""
        if name not in self:
            raise ValueError(f"{self.dir}: tensor {name} is missing: the checkpoint is incomplete or of another model")
        full_name = self._full_name[name]
        file = self._file_of[full_name]
        if file not in self._handles:
            self._handles[file] = self._open_files.enter_context(open_tensors(self.dir / file))
        with reading(self.dir / file):
            stored = self._handles[file].get_slice(full_name)
        return self._part_of[name](stored) if name in self._part_of else stored

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError naming the tensor and its file when it is missing or has another shape."""
        part = self.slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(f"{self.where(name)} has shape {tuple(part.get_shape())} but config.json asks for {shape}")
        if part.get_dtype() not in STORED_FLOATS:
            raise ValueError(f"{self.where(name)} is {part.get_dtype()}, quantised: give the unquantised checkpoint")

    def check_names(self, arch: Architecture) -> None:
        """Raises ValueError naming a tensor that a model of this architecture would leave out, so that transformers or
        vLLM could compute with what the trainer has not read; a head beside `tied` must equal its embedding."""
        read = text_tensors(arch)
        for name in self._full_name:
            known = name in read or name.endswith(NOT_WEIGHTS) or (arch.vision and name.startswith("visual."))
            if not known:
                model = f"the {arch.model_type} of {arch.layers} layers"
                raise ValueError(f"{self.where(name)} is no part of {model} in config.json: correct one of the two")
        if arch.tied and "lm_head.weight" in self and not self._equal("lm_head.weight", "embed_tokens.weight"):
            raise ValueError(
                f"{self.where('lm_head.weight')} differs from the embedding, but config.json says tie_word_embeddings "
                "true: set it to false to keep this head, or delete the tensor"
            )

    def _equal(self, one: str, other: str, rows: int = 16384) -> bool:
        first, second = self.slice(one), self.slice(other)
        if first.get_shape() != second.get_shape():
            return False
        starts = range(0, first.get_shape()[0], rows)
        return all(torch.equal(first[start : start + rows], second[start : start + rows]) for start in starts)

    def where(self, name: str) -> str:
        """The tensor's file and full name, for an error line."""
        full_name = self._full_name[name]
        return f"{self.dir / self._file_of[full_name]}: tensor {full_name}"


def _mlp_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Of a layer's MLP, or of its router and its last expert: short name in the layer -> shape."""
    prefix, router = "mlp", {}
    if arch.mixture is not None:
        prefix = f"mlp.experts.{arch.mixture.experts - 1}"
        router = {"mlp.gate.weight": (arch.mixture.experts, arch.hidden)}
    gate, down = (arch.ffn, arch.hidden), (arch.hidden, arch.ffn)
    return {**router, f"{prefix}.gate_proj.weight": gate, f"{prefix}.down_proj.weight": down}


def check_sizes(checkpoint_dir: str | Path) -> None:
    """Raises ValueError where config.json asks for another model than the files hold, before memory is taken for it."""
    arch = Architecture.from_pretrained(checkpoint_dir)
    last, keys = f"layers.{arch.layers - 1}", arch.kv_heads * arch.head_dim
    with CheckpointReader(checkpoint_dir) as reader:
        reader.check_shape("embed_tokens.weight", (arch.vocab, arch.hidden))
        reader.check_shape("layers.0.self_attn.k_proj.weight", (keys, arch.hidden))
        for name, shape in _mlp_shapes(arch).items():
            reader.check_shape(f"layers.0.{name}", shape)
            reader.check_shape(f"{last}.{name}", shape)


def check_names(checkpoint_dir: str | Path) -> None:
    """Raises ValueError as `CheckpointReader.check_names` does, from the files' headers (and a tied head's rows), or as
    `check_sizes`."""
    check_sizes(checkpoint_dir)
    with CheckpointReader(checkpoint_dir) as reader:
        reader.check_names(Architecture.from_pretrained(checkpoint_dir))


def build_student(
    arch: Architecture,
    layout: Layout,
    dtype: torch.dtype,
    *,
    train: Sequence[str] | None = None,
    train_merger: bool = False,
    adapter: AdapterConfig | None = None,
) -> list[LanguageModel]:
    """`build_chunks` where what is not trained is frozen. Raises ValueError for a pattern that takes no weight.

    train: patterns of weights (see vold.models.selection); None: the language model, or behind adapters nothing.
    """
    patterns = trained_patterns(train, train_merger=train_merger, has_adapter=adapter is not None)
    if train is not None:
        check_patterns("train", patterns, weight_groups(arch))
    targets = adapter.targets if adapter else ()
    chunks = build_chunks(
        arch,
        layout,
        dtype,
        train_merger=takes_mergers(patterns, arch) or "merger" in targets,
        train_tower=takes_tower(patterns, arch) or "tower" in targets,
        adapter=adapter,
    )
    for chunk in chunks:
        _freeze_others(chunk, patterns)
    return chunks


def weight_groups(arch: Architecture) -> list[tuple[str, ...]]:
    """Short names of all weights that can be trained; those that are one parameter here are together."""
    layer = {name: key for key, rule in layer_rules(arch).items() for name in rule.names}
    groups: dict[tuple, list[str]] = {}
    for name in sorted(text_tensors(arch) - ({"lm_head.weight"} if arch.tied else set())):
        _, _, number_and_rest = name.partition("layers.")
        number, _, rest = number_and_rest.partition(".")
        groups.setdefault((number, layer[rest]) if rest in layer else (name,), []).append(name)
    return [*map(tuple, groups.values()), *((name,) for name in tower_tensors(arch))]


def check_rates(
    arch: Architecture,
    rates: Mapping[str, float],
    train: Sequence[str] | None,
    adapter: AdapterConfig | None,
    train_merger: bool,
) -> None:
    """Raise ValueError for a pattern of optimizer.lr_groups that takes no trained weight."""
    patterns = trained_patterns(train, train_merger=train_merger, has_adapter=adapter is not None)
    names = [name for group in weight_groups(arch) for name in group if first_match(patterns, name)]
    for target in adapter.targets if adapter else ():
        if target not in LINEARS:
            modules = [name for name in tower_linears(arch) if visual_target(name) == target]
            names += [f"visual.{name}.lora_{letter}.weight" for name in modules for letter in "AB"]
            continue
        pieces = [rule for key, rule in ADAPTER_RULES.items() if key.startswith(f"{LINEARS[target]}.")]
        names += [f"layers.{layer}.{rule.names[0]}" for rule in pieces for layer in range(arch.layers)]
    for pattern in rates:
        if not any(first_match([pattern], name) for name in names):
            raise ValueError(f"optimizer.lr_groups: {pattern!r} takes no weight that is trained; see train")


def backward_of(
    arch: Architecture, *, train: Sequence[str] | None, train_merger: bool, adapter: AdapterConfig | None
) -> flops.Backward:
    """What a student's backward pass computes; see build_student."""
    patterns = trained_patterns(train, train_merger=train_merger, has_adapter=adapter is not None)
    through_embedding = adapter is not None or takes_mergers(patterns, arch)
    return flops.backward_of(arch, lambda name: first_match(patterns, name) is not None, through_embedding)


def _freeze_others(chunk: LanguageModel, patterns: Sequence[str]) -> None:
    """Train the weights that the patterns take, and adapters, and nothing else."""
    names = {}
    for name, parameter, rule in named_rules(chunk):
        rule = EMBEDDING_RULE if rule == HEAD_RULE and chunk.arch.tied else rule
        names[name] = is_adapter(rule) or first_match(patterns, rule.names[0]) is not None
        parameter.requires_grad_(names[name])
    chunk.trained = frozenset(name for name, is_trained in names.items() if is_trained)
    if not chunk.pre_process or chunk.adapter is not None or chunk.embedding.word_embeddings.weight.requires_grad:
        return
    is_text_trained = any(not name.startswith("visual.") for name in chunk.trained)
    if chunk.layout.recompute != "none" or chunk.layout.pp > 1 or not is_text_trained:
        train_embeddings_output(chunk.embedding)  # otherwise the backward pass ends at the first trained layer


def load_chunks(
    checkpoint: Path,
    layout: Layout,
    dtype: torch.dtype,
    *,
    train: Sequence[str] | None = None,
    train_merger: bool = False,
    adapter: AdapterConfig | None = None,
) -> list[LanguageModel]:
    """This rank's part of the language model in a checkpoint directory (see build_student), with its weights, and new
    adapters where `adapter` asks for them."""
    arch = Architecture.from_pretrained(checkpoint)
    check_sizes(checkpoint)
    if adapter is not None and adapter.base_bits is not None:
        open_bitsandbytes()
    chunks = build_student(arch, layout, dtype, train=train, train_merger=train_merger, adapter=adapter)
    for chunk in chunks:
        load_pretrained(chunk, checkpoint)
        if adapter is not None and adapter.base_bits is not None:
            quantise(chunk, adapter.base_bits)
    return chunks


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
    for name, shape, index, parameter, rule in _tensor_pieces(chunks):
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
