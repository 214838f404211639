"""The vision tower alone: only its own tensors are read, its features are transformers'."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import tiny
from vold.models.architecture import Architecture
from vold.models.images import image_grids
from vold.models.vision import FrozenVisionTower
from vold.types import Picture

GENERATOR = torch.Generator().manual_seed(0)
PICTURES = [
    Picture(str(grid), torch.randn(math.prod(grid), tiny.PATCH_VALUES, generator=GENERATOR), grid)
    for grid in ((1, 4, 6), (1, 8, 8), (1, 2, 4))
]
PIXELS, GRIDS = torch.cat([picture.pixel_values for picture in PICTURES]), image_grids(PICTURES)


def tower(directory, dtype=torch.float32, **options):
    return FrozenVisionTower(directory, Architecture.from_pretrained(directory), dtype, **options)


def keep(directory, wanted, rename=lambda name: name):
    path = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items() if wanted(name)}
    save_file(tensors, path, metadata={"format": "pt"})


def levels_of(reference, pixels=PIXELS):
    """transformers' features of all pictures, one tensor a level."""
    out = reference.model.visual(pixels, grid_thw=GRIDS)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


def together(features):
    return [torch.cat(level) for level in zip(*features.values(), strict=True)]


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_features_equal_transformers_with_nothing_but_the_tower_on_disk(family, prefix, tmp_path):
    reference = tiny.FAMILIES[family]()
    directory = tiny.save(reference, tmp_path / "c")
    keep(directory, lambda n: "visual." in n, lambda n: prefix + n.split("visual.")[1])
    features = tower(directory).features(PICTURES)
    assert [len(features[picture.key][0]) for picture in PICTURES] == [6, 16, 2]
    for found, expected in zip(together(features), levels_of(reference), strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_picture_is_looked_at_once_in_passes_of_bounded_size(family, tmp_path, monkeypatch):
    directory = tiny.save(tiny.FAMILIES[family](), tmp_path / "c")
    eyes, whole = tower(directory, patches_per_pass=32), tower(directory).features(PICTURES)
    seen, forward = [], eyes._tower.forward

    def counted(pixels, **grids):
        seen.append(len(pixels))
        return forward(pixels, **grids)

    monkeypatch.setattr(eyes._tower, "forward", counted)
    found = eyes.features([*PICTURES, *reversed(PICTURES)])
    assert seen == [24, 64, 8], "24 + 64 are too many, and 64 + 8"
    for key, levels in whole.items():
        for level, expected in zip(found[key], levels, strict=True):
            torch.testing.assert_close(level, expected, rtol=0, atol=1e-5)


def test_bfloat16_tower_equals_transformers_loaded_in_bfloat16(tmp_path):
    reference = tiny.qwen2_5_vl()
    directory = tiny.save(reference, tmp_path / "c")
    expected = levels_of(type(reference).from_pretrained(directory, dtype=torch.bfloat16), PIXELS.bfloat16())
    assert torch.equal(together(tower(directory, torch.bfloat16).features(PICTURES))[0], expected[0])


def test_without_pictures_nothing_is_read(tmp_path):
    directory = tiny.save(tiny.qwen2_5_vl(), tmp_path / "c")
    keep(directory, lambda n: "visual" not in n)
    assert tower(directory).features([]) == {}


def test_a_missing_tensor_is_named(tmp_path):
    directory = tiny.save(tiny.qwen2_5_vl(), tmp_path / "c")
    keep(directory, lambda n: n != "visual.merger.ln_q.weight")
    with pytest.raises(ValueError, match=r"visual\.merger\.ln_q\.weight is missing"):
        tower(directory).features(PICTURES)
