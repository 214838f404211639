"""The vision tower alone: only its own tensors are read, its features are transformers'."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vold.models.vision import FrozenVisionTower

GRID = torch.tensor([[1, 4, 6], [1, 8, 8]])
PIXELS = torch.randn(int(GRID.prod(-1).sum()), tiny.PATCH_VALUES, generator=torch.Generator().manual_seed(0))


def keep(directory, wanted, rename=lambda name: name):
    path = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items() if wanted(name)}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_features_equal_transformers_with_nothing_but_the_tower_on_disk(prefix, tmp_path):
    reference = tiny.qwen2_5_vl()
    directory = tiny.save(reference, tmp_path / "c")
    keep(directory, lambda n: n.startswith("visual."), lambda n: n.replace("visual.", prefix))
    features = FrozenVisionTower.from_pretrained(directory, torch.float32).features(PIXELS, GRID)
    expected = reference.model.visual(PIXELS, grid_thw=GRID).pooler_output
    assert features.shape == (6 + 16, 64) and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_bfloat16_tower_equals_transformers_loaded_in_bfloat16(tmp_path):
    reference = tiny.qwen2_5_vl()
    directory = tiny.save(reference, tmp_path / "c")
    expected = type(reference).from_pretrained(directory, dtype=torch.bfloat16).model.visual(PIXELS.bfloat16(), GRID)
    features = FrozenVisionTower.from_pretrained(directory, torch.bfloat16).features(PIXELS, GRID)
    assert torch.equal(features, expected.pooler_output)


def test_a_text_only_checkpoint_has_no_tower(tmp_path):
    assert FrozenVisionTower.from_pretrained(tiny.save(tiny.qwen3(), tmp_path / "c"), torch.float32) is None


def test_a_missing_tensor_is_named(tmp_path):
    directory = tiny.save(tiny.qwen2_5_vl(), tmp_path / "c")
    keep(directory, lambda n: n != "visual.merger.ln_q.weight")
    with pytest.raises(ValueError, match=r"visual\.merger\.ln_q\.weight is missing"):
        FrozenVisionTower.from_pretrained(directory, torch.float32)
