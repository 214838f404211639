"""VA-OPD's weights: the published test vector, the groups of tokens, and what a degraded image keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vold.objectives.visual_advantage import (
    concentration,
    degrade,
    rollout_weights,
    token_advantage,
    token_weights,
    weigh_siblings,
)

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def test_the_published_vector():
    weights = rollout_weights(torch.tensor([0.045, 0.03, 0.02, 0.01]))
    assert weights.tolist() == pytest.approx([0.656, 0.206, 0.095, 0.044], abs=6e-4)


def test_the_absolute_advantage_counts_what_the_detail_speaks_against():
    found = token_advantage(torch.tensor([-0.1, -2.0, -1.0]), torch.tensor([-1.1, -0.5, -1.0]), absolute=True)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.5, 0.0]))


def test_siblings_that_gain_equally_weigh_the_same():
    assert rollout_weights(torch.full((4,), 0.3)).tolist() == [0.25] * 4
    assert rollout_weights(torch.tensor([0.7])).tolist() == [1.0]


def test_weights_do_not_depend_on_the_unit_and_sharpen_with_tau():
    means = torch.tensor([0.5, 0.1, 0.4, 0.2])
    torch.testing.assert_close(rollout_weights(means), rollout_weights(7 * means + 3))
    assert rollout_weights(means, tau=0.5).max() > rollout_weights(means).max()


def test_only_what_the_detail_adds_counts():
    found = token_advantage(torch.tensor([-0.1, -2.0, -1.0]), torch.tensor([-1.1, -0.5, -1.0]))
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_half_the_weight_lies_on_the_top_fifth():
    advantage = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    expected = [0.0625] * 10
    expected[1] = expected[6] = 0.25
    assert token_weights(advantage).tolist() == pytest.approx(expected)
    assert token_weights(torch.zeros(6)).tolist() == pytest.approx([0.25] * 2 + [0.125] * 4), "1.2 tokens are two"
    assert token_weights(torch.tensor([0.3])).tolist() == [1.0], "there is no rest"


@given(lengths, st.integers(0, 99))
def test_weights_of_a_prompt_add_up_to_one_and_are_those_of_the_formula(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    advantages = [torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
    divergences = [torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
    weights = weigh_siblings(advantages)
    assert sum(float(w.sum()) for w in weights) == pytest.approx(1.0)
    z = np.array([float(a.mean()) for a in advantages])
    z = np.exp((z - z.mean()) / (z.std() or 1.0))
    expected = 0.0
    for share, advantage, divergence in zip(z / z.sum(), advantages, divergences, strict=True):
        cut = -(-len(advantage) // 5)
        order = sorted(range(len(advantage)), key=lambda place: -float(advantage[place]))
        top, rest = (divergence[places].mean() if places else None for places in (order[:cut], order[cut:]))
        expected += share * float(top if rest is None else 0.5 * top + 0.5 * rest)
    assert float(sum((w * d).sum() for w, d in zip(weights, divergences, strict=True))) == pytest.approx(expected)


def test_the_weights_decide_where_the_gradient_goes():
    """Twice the advantage on one response pulls more of the loss's gradient to it, and to its decisive token most."""
    logits = torch.zeros(2, 10, requires_grad=True)
    flat = torch.full((2, 10), 0.1)
    seeing = flat.clone()
    seeing[1, 4] = 2.0
    pulls = []
    for advantages in (flat, seeing):
        weights = torch.stack(weigh_siblings(list(advantages)))
        [gradient] = torch.autograd.grad((weights * (logits - 1).square()).sum(), logits)
        pulls.append(gradient.abs())
    even, aimed = pulls
    assert torch.allclose(even.sum(1), even.sum(1).mean().expand(2))
    assert aimed[1].sum() > 5 * aimed[0].sum() and aimed[1, 4] == aimed[1].max()


def test_a_degraded_image_has_its_size_and_colours_but_no_detail():
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[:, 50:] = (200, 100, 0)
    pixels[29:31, 20:22] = 255  # a small decisive thing
    found = np.asarray(degrade(Image.fromarray(pixels)))
    assert found.shape == pixels.shape
    blocks = found.reshape(6, 10, 10, 10, 3)
    assert (blocks == blocks[:, :1, :, :1]).all(), "one colour in each"
    assert (found[:, 80] == (200, 100, 0)).all() and found[30, 21].max() < 64
    assert degrade(Image.new("L", (3, 4))).size == (3, 4)


def test_concentration():
    assert float(concentration(torch.tensor([1.0] * 10 + [9.0] + [0.0] * 9))) == pytest.approx(10 / 19)
    assert float(concentration(torch.zeros(20))) == pytest.approx(0.1)
