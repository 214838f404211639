"""Names and layouts of weights in Hugging Face checkpoints and in the Megatron model.

One Megatron parameter is one or several Hugging Face tensors, joined by a `Rule`. The same table loads, exports, saves
checkpoints and syncs samplers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vold.models.adapters import LINEARS
from vold.models.architecture import Architecture
from vold.models.joined import weight_rows
from vold.models.language_model import LanguageModel
from vold.parallel.launch import Layout

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
VISUAL_ADAPTER = re.compile(r"\.adapter\.lora_([AB])\.0$")


@dataclass(frozen=True)
class Rule:
    """The assembly of a Megatron parameter from Hugging Face tensors.

    names    relative to the layer or to the model
    join     "single": the tensor itself; "qkv": for each group its queries (and their gates, where heads have one),
             key, value; "gated": gate rows, then up's; "rows": one after another
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
    "self_attention.in_proj.weight": Rule(tuple(f"linear_attn.in_proj_{x}.weight" for x in "qkvzba"), "rows", 0),
    "self_attention.conv": Rule(tuple(f"linear_attn.conv1d_{x}.weight" for x in "qkv"), "rows", 0),
    "self_attention.A_log": Rule(("linear_attn.A_log",), split=0),
    "self_attention.dt_bias": Rule(("linear_attn.dt_bias",), split=0),
    "self_attention.norm": Rule(("linear_attn.norm.weight",)),
    "self_attention.out_proj.weight": Rule(("linear_attn.out_proj.weight",), split=1),
    "mlp.linear_fc1.weight": Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated", 0),
    "mlp.linear_fc2.weight": Rule(("mlp.down_proj.weight",), split=1),
    "mlp.router.weight": Rule(("mlp.gate.weight",)),
    "mlp.shared.linear_fc1.weight": Rule(
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"), "gated", 0
    ),
    "mlp.shared.linear_fc2.weight": Rule(("mlp.shared_expert.down_proj.weight",), split=1),
    "mlp.shared.gate": Rule(("mlp.shared_expert_gate.weight",)),
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


def layer_rules(arch: Architecture, layer: int) -> dict[str, Rule]:
    """The rules of one layer's parameters, undivided. layer: from 0"""
    is_delta_net = arch.is_delta_net(layer)
    absent = {key for key, rule in LAYER_RULES.items() if rule.names[0].startswith("linear_attn.") != is_delta_net}
    absent &= {key for key in LAYER_RULES if key.startswith("self_attention.")}
    absent |= {"self_attention.linear_qkv.bias"} if not arch.qkv_bias else set()
    if not arch.qk_norm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    if arch.mixture is None or not arch.mixture.shared:
        absent |= {key for key in LAYER_RULES if key.startswith("mlp.shared.")}
    if arch.mixture is None:
        absent |= {"mlp.router.weight", "mlp.experts.fc1", "mlp.experts.fc2"}
    else:
        absent |= {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    experts = range(arch.mixture.experts if arch.mixture else 0)
    rules = {key: rule for key, rule in LAYER_RULES.items() if key not in absent}
    return {key: rule.of_experts(experts) if rule.experts else rule for key, rule in rules.items()}


def text_tensors(arch: Architecture) -> set[str]:
    """Short names of the tensors that a language model of this architecture reads."""
    of_layers = {
        f"layers.{layer}.{name}"
        for layer in range(arch.layers)
        for rule in layer_rules(arch, layer).values()
        for name in rule.names
    }
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
    return [(rows, *full[1:]) for rows in _piece_rows(rule, full[0], arch)]


def _piece_rows(rule: Rule, rows: int, arch: Architecture) -> list[int]:
    """The rows of each of a rule's matrices where all, or a share of all, have `rows`."""
    if rule.join == "gated":
        return [rows // 2] * 2
    of_all = [weight_rows(name, arch) for name in rule.names]
    return [count * rows // sum(of_all) for count in of_all]


def join_pieces(rule: Rule, pieces: list[Tensor], arch: Architecture) -> Tensor:
    """Hugging Face tensors (a tp share of each) -> the Megatron parameter."""
    if rule.experts:
        count = len(rule.names) // rule.experts
        return torch.stack([join_pieces(rule.one, pieces[i : i + count], arch) for i in range(0, len(pieces), count)])
    if rule.join == "single":
        return pieces[0]
    if rule.join != "qkv":
        return torch.cat(pieces)
    per_group = [x.unflatten(0, (-1, rows)) for x, rows in zip(pieces, _group_rows(arch), strict=True)]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def split_pieces(rule: Rule, parameter: Tensor, arch: Architecture) -> list[Tensor]:
    """The Megatron parameter -> the same share of each Hugging Face tensor; inverse of `join_pieces`."""
    if rule.experts:
        return [piece for matrix in parameter for piece in split_pieces(rule.one, matrix, arch)]
    if rule.join == "single":
        return [parameter]
    if rule.join != "qkv":
        return list(parameter.split(_piece_rows(rule, len(parameter), arch)))
    rows = _group_rows(arch)
    return [x.flatten(0, 1) for x in parameter.unflatten(0, (-1, sum(rows))).split(rows, dim=1)]


def _group_rows(arch: Architecture) -> list[int]:
    return [weight_rows(f"{x}_proj.weight", arch) // arch.kv_heads for x in "qkv"]


def tensor_shapes(chunks: Sequence[LanguageModel]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """For every Hugging Face tensor in these chunks, adapters left out: short name, full shape, number of its elements
    that they hold. A tied head counts with its embedding."""
    for name, shape, _, _, rule in tensor_pieces(chunks):
        if is_adapter(rule):
            continue
        yield name, shape, math.prod(shape) // sharing_of(rule, chunks[0].layout).ranks


def tensor_pieces(
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
