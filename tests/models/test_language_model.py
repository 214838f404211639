"""The Megatron model against transformers: hidden states times head, and gradients. T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import tiny
from vold.data.packing import EncodedPrompt, TextPromptEncoder, pack
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states, open_vision_tower
from vold.models.weights import load_pretrained
from vold.types import Prompt, Sample

GRIDS = ((1, 4, 6),), ((1, 8, 4), (1, 4, 4))


FAMILIES = [
    *((family, tied, False) for family in tiny.FAMILIES for tied in (True, False)),
    *((family, False, True) for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")),
]


def hidden_TD(model, tokens, vision=None):
    return hidden_states(model, tokens, vision and vision.features(tokens.pictures))


def logits_TV(model, tokens, vision=None):
    return hidden_TD(model, tokens, vision) @ model.head_weight().T


def opened(directory, layout, *, train_merger=False):
    """(Megatron model, its vision tower or None)"""
    arch = Architecture.from_pretrained(directory)
    model = build_language_model(arch, layout, torch.float32, train_merger=train_merger)
    load_pretrained(model, directory)
    return model, open_vision_tower([model], directory, torch.float32)


@pytest.fixture(params=FAMILIES, ids=lambda p: f"{p[0]}-tied={p[1]}" + "-merger" * p[2])
def pair(request, tmp_path, layout):
    """(Megatron model, transformers model, vision tower or None) with the same weights."""
    family, tied, train_merger = request.param
    reference = tiny.FAMILIES[family](tied=tied)
    directory = tiny.save(reference, tmp_path / "checkpoint")
    model, vision = opened(directory, layout, train_merger=train_merger)
    return model, reference, vision


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
    alone = torch.cat([hidden_TD(model, tiny.pack([row]), vision) for row in rows])
    # the delta rule's matmuls of other sizes round otherwise, by processor (5.4e-6 on one)
    atol = 1e-5 if model.arch.delta_net is not None else 3e-6
    torch.testing.assert_close(hidden_TD(model, tiny.pack(rows), vision), alone, rtol=1e-6, atol=atol)


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

    class Expanded(TextPromptEncoder):
        """Prompts whose image-pad ids were expanded beforehand."""

        def __call__(self, prompt):
            row = prompts[prompt.id]
            return EncodedPrompt(prompt.token_ids, row.positions_3L, row.pictures)

    [micro] = pack(samples, max_tokens=999, encode=Expanded()).micro_batches
    assert micro.tokens.input_ids_T.numel() == sum(len(row.ids) + 3 + 0 + 8 + 3 for row in prompts.values())
    expected = []
    for sample in (samples[place] for place in micro.sample_B):
        ids = torch.tensor([*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()])
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


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def student(request, tmp_path, layout):
    return opened(tiny.save(tiny.FAMILIES[request.param](), tmp_path / "checkpoint"), layout)


def test_the_tower_is_frozen_and_outside_the_model(student):
    model, vision = student
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    tokens = tiny.pack([tiny.image_row(model.arch, *GRIDS[1])])
    hidden_TD(model, tokens, vision).square().sum().backward()
    tower = list(vision._tower.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in tower)
    assert not {id(p) for p in tower} & {id(p) for p in model.parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in vision.state_dict().items())


def test_images_change_the_hidden_states(student):
    model, vision = student
    row = tiny.image_row(model.arch, *GRIDS[0])
    brighter = tuple(replace(picture, pixel_values=picture.pixel_values + 1) for picture in row.pictures)
    one, two = (hidden_TD(model, tiny.pack([r]), vision) for r in (row, replace(row, pictures=brighter)))
    first_image = (row.ids == tiny.IMAGE_PAD).nonzero()[0, 0]
    assert torch.equal(one[:first_image], two[:first_image])
    assert (one - two)[first_image:].abs().amax(-1).min() > 1e-3


def test_images_without_a_tower_or_with_unexpanded_pads_are_refused(student):
    model, vision = student
    row = tiny.image_row(model.arch, *GRIDS[0])
    with pytest.raises(ValueError, match="no vision tower"):
        hidden_states(model, tiny.pack([row]))
    short = replace(row, ids=row.ids[:-6], positions_3L=row.positions_3L[:, :-6])
    with pytest.raises(ValueError, match="image-pad tokens but 6 image features"):
        hidden_TD(model, tiny.pack([short]), vision)
