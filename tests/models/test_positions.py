"""Image-pad expansion and the three position axes."""

from __future__ import annotations

import pytest
import torch

from support import tiny
from vold.models.architecture import Architecture
from vold.models.positions import expand_image_tokens, mrope_positions, text_positions

VL = Architecture.from_config(tiny.qwen2_5_vl().config)
TEXT = Architecture.from_config(tiny.qwen3().config)
PAD = tiny.IMAGE_PAD


def grid(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def test_text_positions_count_up_on_every_axis():
    assert text_positions(3).tolist() == [[0, 1, 2]] * 3
    assert torch.equal(mrope_positions(torch.tensor([4, 5, 6]), None, VL), text_positions(3))


def test_positions_of_one_image_by_hand():
    """4 x 6 patches merge to 2 x 3; text after the image continues at start + max(2, 3)."""
    ids = torch.tensor(expand_image_tokens([1, PAD, 2], grid((1, 4, 6)), VL))
    assert mrope_positions(ids, grid((1, 4, 6)), VL).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_two_images_equal_transformers(family):
    model = tiny.FAMILIES[family]()
    arch, grids = Architecture.from_config(model.config), grid((1, 8, 4), (1, 4, 4))
    ids = torch.tensor(expand_image_tokens([1, PAD, 2, 3, PAD, 4], grids, arch))
    expected, _ = model.model.get_rope_index(ids[None], (ids == PAD).int()[None], image_grid_thw=grids)
    assert torch.equal(mrope_positions(ids, grids, arch), expected[:, 0])


def test_expansion_repeats_each_pad_by_its_own_image():
    assert expand_image_tokens([1, PAD, 2, PAD], grid((1, 4, 4), (1, 2, 4)), VL) == (1, *[PAD] * 4, 2, *[PAD] * 2)
    assert expand_image_tokens([1, 2], None, VL) == (1, 2)
    assert expand_image_tokens([1, PAD], None, TEXT) == (1, PAD)  # an ordinary id of a text-only model


@pytest.mark.parametrize(("ids", "grids"), [([1, PAD], None), ([1], grid((1, 4, 4))), ([PAD] * 4, grid((1, 4, 4)))])
def test_a_different_number_of_images_and_pads_is_an_error(ids, grids):
    with pytest.raises(ValueError, match="image-pad ids: write one"):
        expand_image_tokens(ids, grids, VL)


def test_pads_that_do_not_fit_the_images_are_an_error():
    with pytest.raises(ValueError, match=r"\[3\] do not match .* \[4\]"):
        mrope_positions(torch.tensor([1, PAD, PAD, PAD]), grid((1, 4, 4)), VL)
    with pytest.raises(ValueError, match=r"\[8\] do not match .* \[4, 4\]"):
        mrope_positions(torch.tensor([PAD] * 8), grid((1, 4, 4), (1, 4, 4)), VL)
    with pytest.raises(ValueError, match="qwen3, which reads text only"):
        mrope_positions(torch.tensor([PAD] * 4), grid((1, 4, 4)), TEXT)
