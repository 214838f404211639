"""The student of a run: its chunks, of which some weights are trained and the others frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vold.config.schema import AdapterConfig
from vold.models import flops
from vold.models.adapters import LINEARS, train_embeddings_output, visual_target
from vold.models.architecture import Architecture
from vold.models.checkpoint_reader import check_sizes
from vold.models.language_model import LanguageModel, build_chunks
from vold.models.quantised import open_bitsandbytes, quantise
from vold.models.selection import check_patterns, first_match, takes_mergers, takes_tower, trained_patterns
from vold.models.vision import tower_linears, tower_tensors
from vold.models.weight_rules import (
    ADAPTER_RULES,
    EMBEDDING_RULE,
    HEAD_RULE,
    is_adapter,
    layer_rules,
    named_rules,
    text_tensors,
)
from vold.models.weights import load_pretrained
from vold.parallel.launch import Layout


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
    layer = {name: key for n in range(arch.layers) for key, rule in layer_rules(arch, n).items() for name in rule.names}
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
