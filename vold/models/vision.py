"""The vision tower: transformers' own modules. Frozen it is outside model, optimiser and checkpoints; what `train`
takes of it is part of the language model's chunks: its patch mergers alone, behind frozen blocks, or the tower whole.

A tower gives each image one tensor for each level. Level 0 replaces the embeddings of the image's tokens; level i > 0
is DeepStack's (Qwen3-VL): added to the hidden states of those tokens after decoder layer i (counted from 1), from an
earlier block.

I image tokens of one image (its merged patches), D hidden width of the text model, C of the tower, M patches merged.
"""

from __future__ import annotations

import pydoc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import open_tensors, tensor_files
from vold.models.families import FAMILIES
from vold.parallel.launch import Layout
from vold.types import Picture

VISION_PREFIXES = ("visual.", "model.visual.")
TOWERS = {
    name: pydoc.locate(f"transformers.models.{family.vision.tower}")
    for name, family in FAMILIES.items()
    if family.vision
}

Features = Mapping[str, tuple[Tensor, ...]]
"""Picture key -> features_ID of each level; where mergers are trained, their input, unmerged_I(MC)."""


class FrozenVisionTower:
    """A checkpoint's vision tower: pictures in, features out, without gradient. Deliberately no nn.Module, so that
    nothing can register it.

    Identical on every tensor-parallel rank; needed where a chunk of the model has vision levels. Weights are read when
    the first picture comes. patches_per_pass: most patches in one forward pass (an image with more goes alone); None:
    no limit. merge_patches: False where the model's own mergers follow the frozen blocks.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        patches_per_pass: int | None = None,
        merge_patches: bool = True,
    ):
        self._path, self._arch, self._model_type = Path(checkpoint_dir), arch.vision, arch.model_type
        self._dtype, self._device = dtype, device
        self._patches_per_pass, self._merge_patches = patches_per_pass, merge_patches

    @cached_property
    def _tower(self) -> PreTrainedModel:
        with no_init_weights():
            tower = TOWERS[self._model_type]._from_config(self._arch.tower_config, dtype=self._dtype)
        tower.load_state_dict(_vision_tensors(self._path, set(tower.state_dict())))
        if not self._merge_patches:
            for level in range(1 + self._arch.deepstack_layers):
                tower.set_submodule(_merger_name(level), _NoMerger(self._arch.merge_size**2))
        return tower.to(self._device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, pictures: Iterable[Picture]) -> Features:
        """The features of every picture; pictures with equal keys are computed once."""
        features: dict[str, tuple[Tensor, ...]] = {}
        for group in self._passes({picture.key: picture for picture in pictures}.values()):
            features |= encode(self._tower, group, self._arch.merge_size)
        return features

    def _passes(self, pictures: Collection[Picture]) -> Iterator[list[Picture]]:
        """The pictures in groups of at most `patches_per_pass` patches."""
        group: list[Picture] = []
        for picture in pictures:
            patches = sum(len(other.pixel_values) for other in group) + len(picture.pixel_values)
            if group and self._patches_per_pass is not None and patches > self._patches_per_pass:
                yield group
                group = []
            group.append(picture)
        if group:
            yield group

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._tower.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The tower's tensors, by their names without a prefix."""
        return self._tower.state_dict()


def encode(tower: PreTrainedModel, pictures: Sequence[Picture], merge_size: int) -> dict[str, tuple[Tensor, ...]]:
    """The features of some pictures in one pass of the tower."""
    pixels = torch.cat([picture.pixel_values for picture in pictures])
    grids = torch.tensor([picture.grid_thw for picture in pictures], device=tower.device)
    out = tower(pixels.to(tower.device, tower.dtype), grid_thw=grids)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    counts = [len(picture.pixel_values) // merge_size**2 for picture in pictures]
    parts = zip(*(level.split(counts) for level in levels), strict=True)
    return {picture.key: part for picture, part in zip(pictures, parts, strict=True)}


def trained_tower(arch: Architecture, dtype: torch.dtype, layout: Layout) -> PreTrainedModel:
    """A whole tower as part of a chunk, weights uninitialised.

    Every tensor-parallel rank holds it undivided and encodes all pictures. Under sequence parallelism the gradient
    comes from the rank's own image tokens only, and the attribute `sequence_parallel` makes Megatron add up the shares.
    """
    with no_init_weights():
        tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config, dtype=dtype)
    for parameter in tower.parameters():
        parameter.sequence_parallel = layout.sp
    if layout.recompute == "full":
        tower._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
    return tower.to(layout.device)


class _BackwardOnce(torch.autograd.Function):
    """Level 0, whose gradient comes last, behind all layers; with it the other levels' go back into the tower, which
    their stand-ins have collected. A recomputed layer runs a backward pass of its own, which must not go on into the
    tower: its graph is used once, for all levels."""

    @staticmethod
    def forward(ctx, stand_ins, first, *_others):
        ctx.stand_ins = stand_ins
        return first.view_as(first)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, gradient, *(level.grad for level in ctx.stand_ins)


def for_recomputed_layers(levels: Sequence[Tensor]) -> list[Tensor]:
    """A trained tower's features, whose gradients reach the tower together."""
    first, *others = levels
    stand_ins = [level.detach().requires_grad_(level.requires_grad) for level in others]
    return [_BackwardOnce.apply(stand_ins, first, *others), *stand_ins]


def tower_tensors(arch: Architecture) -> tuple[str, ...]:
    """Names of the tower's weights, `visual.…`; none where there is no tower."""
    if arch.vision is None:
        return ()
    with torch.device("meta"), no_init_weights():
        tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config)
    return tuple(f"visual.{name}" for name, _ in tower.named_parameters())


def tower_linears(arch: Architecture) -> tuple[str, ...]:
    """Names of the tower's linear layers, without `visual.`"""
    if arch.vision is None:
        return ()
    with torch.device("meta"), no_init_weights():
        tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config)
    return tuple(name for name, module in tower.named_modules() if isinstance(module, nn.Linear))


def is_merger(name: str) -> bool:
    return name.startswith(("visual.merger.", "visual.deepstack_merger_list."))


class _NoMerger(nn.Module):
    """Replaces a merger: puts the M patches of each image token side by side, unmerged_I(MC)."""

    def __init__(self, merged: int):
        super().__init__()
        self._merged = merged

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self._merged * x.shape[-1])


class Mergers(nn.Module):
    """Trained patch mergers of some levels, under their names in a checkpoint; weights uninitialised.

    Every tensor-parallel rank holds them undivided. Under sequence parallelism a rank merges its share of the tokens
    only, and the attribute `sequence_parallel` makes Megatron add up the shares' gradients.
    """

    def __init__(self, arch: Architecture, levels: Sequence[int], dtype: torch.dtype, layout: Layout):
        super().__init__()
        self._merged = arch.vision.merge_size**2
        with torch.device("meta"):
            tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config, dtype=dtype)
        mergers = {level: tower.get_submodule(_merger_name(level)) for level in levels}
        if 0 in mergers:
            self.merger = mergers.pop(0)
        self.deepstack_merger_list = nn.ModuleDict({str(level - 1): merger for level, merger in mergers.items()})
        self.to_empty(device=layout.device)
        for parameter in self.parameters():
            parameter.sequence_parallel = layout.sp

    def forward(self, level: int, unmerged: Tensor) -> Tensor:
        """unmerged_I(MC) -> features_ID"""
        return self.get_submodule(_merger_name(level))(unmerged.view(-1, unmerged.shape[-1] // self._merged))


def _merger_name(level: int) -> str:
    return f"deepstack_merger_list.{level - 1}" if level else "merger"


def _vision_tensors(path: Path, expected: set[str]) -> dict[str, Tensor]:
    """{name without prefix: tensor}; ValueError naming the first missing one."""
    tensors = {}
    names_by_file: dict[str, list[str]] = {}
    for name, file in tensor_files(path).items():
        if name.startswith(VISION_PREFIXES):
            names_by_file.setdefault(file, []).append(name)
    for file, names in names_by_file.items():
        with open_tensors(path / file) as handle:
            tensors |= {name.split("visual.", 1)[1]: handle.get_tensor(name) for name in names}
            for name in names:
                if not handle.get_tensor(name).isfinite().all():
                    raise ValueError(f"{path / file}: tensor {name} holds NaN or infinite values; copy it again")
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(f"{path}: tensor visual.{missing[0]} is missing: the checkpoint is incomplete")
    return tensors
