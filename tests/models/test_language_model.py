"""The Megatron model against transformers: hidden states times head, and gradients. T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from vold.data.pack import Encoded, pack
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states
from vold.models.vision import FrozenVisionTower
from vold.models.weights import load_pretrained
from vold.records import Prompt, Sample

GRIDS = ((1, 4, 6),), ((1, 8, 4), (1, 4, 4))


def logits_TV(model, tokens, vision=None):
    return hidden_states(model, tokens, vision) @ model.head_weight().T


@pytest.fixture(params=[(f, t) for f in tiny.FAMILIES for t in (True, False)], ids=lambda p: f"{p[0]}-tied={p[1]}")
def pair(request, tmp_path, layout):
    """(Megatron model, transformers model, vision tower or None) with the same weights."""
    family, tied = request.param
    reference = tiny.FAMILIES[family](tied=tied)
    directory = tiny.save(reference, tmp_path / "checkpoint")
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.float32)
    load_pretrained(model, directory)
    return model, reference, FrozenVisionTower.from_pretrained(directory, torch.float32)


def rows_for(model):
    rows = [tiny.text_row(5, seed=1), tiny.text_row(9, seed=2), tiny.text_row(1, seed=3), tiny.text_row(9, seed=4)]
    if model.arch.vision is not None:
        rows[1:1] = [tiny.image_row(model.arch, *grids, seed=s) for s, grids in enumerate(GRIDS)]
    return rows


def test_logits_of_a_packing_equal_transformers_row_by_row(pair):
    model, reference, vision = pair
    rows = rows_for(model)
    expected = torch.cat([row.logits(reference) for row in rows])
    torch.testing.assert_close(logits_TV(model, tiny.pack(rows), vision), expected, rtol=0, atol=1e-5)


def test_packed_equals_unpacked(pair):
    model, _, vision = pair
    rows = rows_for(model)
    alone = torch.cat([hidden_states(model, tiny.pack([row]), vision) for row in rows])
    torch.testing.assert_close(hidden_states(model, tiny.pack(rows), vision), alone, rtol=0, atol=1e-6)


def test_gradients_equal_transformers(pair):
    model, reference, vision = pair
    rows = rows_for(model)
    logits = logits_TV(model, tiny.pack(rows), vision)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * upstream).sum().backward()
    (torch.cat([row.logits(reference) for row in rows]) * upstream).sum().backward()
    error, name = tiny.worst_gradient_error(model, reference)
    assert error <= 1e-4, name


def test_responses_that_share_a_prompt_equal_transformers_one_by_one(pair):
    """Logits and gradients, where `pack` lays prompts once: of text, and with two images."""
    model, reference, vision = pair
    prompts = {str(number): tiny.text_row(length, seed=number) for number, length in enumerate((7, 3, 7))}
    if vision is not None:
        prompts["images"] = tiny.image_row(model.arch, *GRIDS[1])
    samples = [
        Sample(
            Prompt(name, tuple(row.ids.tolist()), ""), tuple(tiny.text_row(length, seed=length).ids.tolist()), 1, 1, 0
        )
        for name, row in prompts.items()
        for length in (4, 1, 9, 4)
    ]

    def encode(prompt):
        row = prompts[prompt.id]
        return Encoded(prompt.token_ids, row.positions_3L, row.pixel_values, row.grid)

    [micro] = pack(samples, max_tokens=999, encode=encode).micro_batches
    assert micro.tokens.input_ids_T.numel() == sum(len(row.ids) + 3 + 0 + 8 + 3 for row in prompts.values())
    expected = []
    for sample in (samples[place] for place in micro.sample_B):
        ids = torch.tensor([*sample.prompt.token_ids, *sample.response_ids])
        whole = replace(prompts[sample.prompt.id], ids=ids).logits(reference)
        expected.append(whole[len(sample.prompt.token_ids) - 1 : -1])
    expected = torch.cat(expected)
    logits = logits_TV(model, micro.tokens, vision)[micro.source_N]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * upstream).sum().backward()
    (expected * upstream).sum().backward()
    error, name = tiny.worst_gradient_error(model, reference)
    assert error <= 1e-4, name


def test_position_ids_are_obeyed_in_every_packing(pair):
    """Megatron's rope has a branch that ignores them and restarts each sequence at 0; no packing may take it."""
    model, reference, _ = pair
    for lengths in ((6,), (4, 4), (3, 7)):
        rows = [tiny.text_row(n, seed=n) for n in lengths]
        shifted = [tiny.Row(row.ids, row.positions_3L * 3 + 11) for row in rows]
        is_vl = model.arch.vision is not None
        expected = [
            reference(r.ids[None], position_ids=r.positions_3L[:, None] if is_vl else r.positions_3L[:1]).logits[0]
            for r in shifted
        ]
        torch.testing.assert_close(logits_TV(model, tiny.pack(shifted)), torch.cat(expected), rtol=0, atol=1e-5)


@pytest.fixture
def student(tmp_path, layout):
    directory = tiny.save(tiny.qwen2_5_vl(), tmp_path / "checkpoint")
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.float32)
    load_pretrained(model, directory)
    return model, FrozenVisionTower.from_pretrained(directory, torch.float32)


def test_the_tower_is_frozen_and_outside_the_model(student):
    model, vision = student
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    tokens = tiny.pack([tiny.image_row(model.arch, *GRIDS[1])])
    hidden_states(model, tokens, vision).square().sum().backward()
    tower = list(vision._tower.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in tower)
    assert not {id(p) for p in tower} & {id(p) for p in model.parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in vision.state_dict().items())


def test_images_change_the_hidden_states(student):
    model, vision = student
    row = tiny.image_row(model.arch, *GRIDS[0])
    other = tiny.Row(row.ids, row.positions_3L, row.pixel_values + 1, row.grid)
    one, two = (hidden_states(model, tiny.pack([r]), vision) for r in (row, other))
    first_image = (row.ids == tiny.IMAGE_PAD).nonzero()[0, 0]
    assert torch.equal(one[:first_image], two[:first_image])
    assert (one - two)[first_image:].abs().amax(-1).min() > 1e-3


def test_images_without_a_tower_or_with_unexpanded_pads_are_refused(student):
    model, vision = student
    row = tiny.image_row(model.arch, *GRIDS[0])
    with pytest.raises(ValueError, match="no vision tower"):
        hidden_states(model, tiny.pack([row]))
    short = tiny.Row(row.ids[:-6], row.positions_3L[:, :-6], row.pixel_values, row.grid)
    with pytest.raises(ValueError, match="image-pad tokens but 6 image features"):
        hidden_states(model, tiny.pack([short]), vision)
