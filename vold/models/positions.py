"""Position ids [3, T] (temporal, height, width) of one sequence, and the expansion of image-pad ids.

Positions of image tokens come from transformers' own function, called without a model.
"""

from __future__ import annotations

import pydoc
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from vold.models.architecture import Architecture, VisionArchitecture
from vold.models.families import FAMILIES

MODEL_CLASSES = {
    name: pydoc.locate(f"transformers.models.{family.vision.positions}")
    for name, family in FAMILIES.items()
    if family.vision
}


def text_positions(length: int) -> Tensor:
    """int64 [3, length]: 0, 1, 2, … on all three axes."""
    return torch.arange(length).expand(3, length)


def mrope_positions(input_ids_T: Tensor, image_grid_thw: Tensor | None, arch: Architecture) -> Tensor:
    """int64 [3, T] of ONE sequence whose image-pad ids are already expanded; grids in the order of the images.

    Raises ValueError when the image-pad ids do not fit the grids, or for a text-only model.
    """
    if image_grid_thw is None or not len(image_grid_thw):
        return text_positions(input_ids_T.numel())
    vision = _vision_of(arch)
    _check_runs(input_ids_T, image_grid_thw, vision)
    vision_config = SimpleNamespace(spatial_merge_size=vision.merge_size, tokens_per_second=vision.tokens_per_second)
    model_class = MODEL_CLASSES[arch.model_type]
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision_config),
        get_vision_position_ids=partial(model_class.get_vision_position_ids, None),
    )
    is_image = (input_ids_T == vision.image_token_id).int()
    positions, _ = model_class.get_rope_index(model, input_ids_T[None], is_image[None], image_grid_thw)
    return positions[:, 0]


def expand_image_tokens(token_ids: Sequence[int], image_grid_thw: Tensor | None, arch: Architecture) -> tuple[int, ...]:
    """Repeat the i-th image-pad id once per merged patch of the i-th image: t * h * w / merge².

    Raises ValueError when the numbers of images and of image-pad ids differ (also when they were expanded before).
    """
    counts = [] if image_grid_thw is None else image_token_counts(image_grid_thw, arch)
    pads = 0 if arch.vision is None else sum(token == arch.vision.image_token_id for token in token_ids)
    if pads != len(counts):
        raise ValueError(f"{len(counts)} images but {pads} image-pad ids: write one image-pad id per image")
    remaining = iter(counts)
    image_id = arch.vision.image_token_id if arch.vision else None
    return tuple(
        token for token_id in token_ids for token in [token_id] * (next(remaining) if token_id == image_id else 1)
    )


def image_token_counts(image_grid_thw: Tensor, arch: Architecture) -> list[int]:
    """Number of merged patches, which are tokens, of each image."""
    return (image_grid_thw.prod(-1) // _vision_of(arch).merge_size ** 2).tolist()


def _vision_of(arch: Architecture) -> VisionArchitecture:
    if arch.vision is None:
        raise ValueError(f"images were given to {arch.model_type}, which reads text only: use a vision checkpoint")
    return arch.vision


def _check_runs(input_ids_T: Tensor, image_grid_thw: Tensor, vision: VisionArchitecture) -> None:
    """Each run of image-pad ids must be as long as its image; two images in one run would be indexed as one."""
    is_image = torch.nn.functional.pad((input_ids_T == vision.image_token_id).int(), (1, 1))
    edges = is_image.diff().nonzero()[:, 0]
    runs = (edges[1::2] - edges[::2]).tolist()
    expected = (image_grid_thw.prod(-1) // vision.merge_size**2).tolist()
    if runs != expected:
        raise ValueError(
            f"runs of image-pad ids {runs} do not match the images' merged patches {expected}: "
            "expand each image-pad id once and separate images by other tokens"
        )
