"""VA-OPD: weight the KL of a token by how much the image's detail changes the teacher's log-probability of it.

A vision-language teacher scores every sampled token twice, with the image v and with a degraded copy v~:

    a_t = max(log p_T(y_t | v) - log p_T(y_t | v~), 0)
    w_i = softmax over siblings of z_i / tau,   z_i = (mean_t a_t - mean over siblings) / population std
    L_i = lambda * mean of KL_t over the 20 % of tokens with the largest a_t + (1 - lambda) * mean of KL_t over the rest

and the loss of a prompt is sum_i w_i L_i, KL_t being KL(student || teacher) over the whole vocabulary, on v. This is a
weight for each token's KL, computed here. G siblings, L response tokens of one of them.

Our choices where the source gives none: the 20 % are rounded up; of equal a_t the earlier is taken; a response that has
top tokens only puts its whole weight on them; siblings whose means differ by rounding alone get the same weight (two of
them would get z = +1 and -1). On request a_t is the absolute difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

ROUNDING = 1e-5
"""Nats; error of a mean of differences between two fp32 log-probs."""


def degrade(image: Image.Image, scale: float = 0.1) -> Image.Image:
    """The image without its detail, at its own size: each side scaled by `scale` (bilinear) and back (nearest)."""
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.NEAREST)


def token_advantage(logp_L: Tensor, logp_degraded_L: Tensor, *, absolute: bool = False) -> Tensor:
    """a_t, nats, [L]: how much the image's detail raises the teacher's log-prob of the sampled token; `absolute`: or
    lowers it, as it does at a token that the student read wrong."""
    difference_L = logp_L - logp_degraded_L
    return difference_L.abs() if absolute else difference_L.clamp_min(0.0)


def rollout_weights(mean_G: Tensor, tau: float = 1.0) -> Tensor:
    """w_i, [G], adding up to 1, from each sibling's mean a_t."""
    centred_G = mean_G - mean_G.mean()
    std = centred_G.square().mean().sqrt()
    return (centred_G / torch.where(std > ROUNDING, std, 1.0) / tau).softmax(0)


def token_weights(advantage_L: Tensor, *, share: float = 0.2, top_weight: float = 0.5) -> Tensor:
    """[L], adding up to 1: `top_weight` (lambda) divided equally over the top `share` of tokens, 1 - lambda over the
    others."""
    top = math.ceil(len(advantage_L) * share)
    others = len(advantage_L) - top
    order_L = advantage_L.argsort(descending=True, stable=True)
    weights_L = torch.empty_like(advantage_L)
    weights_L[order_L[:top]] = (top_weight if others else 1.0) / top
    weights_L[order_L[top:]] = (1.0 - top_weight) / max(others, 1)
    return weights_L


def weigh_siblings(advantages: Sequence[Tensor]) -> list[Tensor]:
    """[L] KL weights of each of G responses to a prompt; over all of them they add up to 1."""
    weights_G = rollout_weights(torch.stack([advantage_L.mean() for advantage_L in advantages]))
    return [weight * token_weights(advantage_L) for weight, advantage_L in zip(weights_G, advantages, strict=True)]


def concentration(advantage_N: Tensor, share: float = 0.1) -> Tensor:
    """Part of the summed advantage that the top `share` of tokens holds (a metric); `share` where the sum is 0."""
    top = advantage_N.sort(descending=True).values[: max(1, round(len(advantage_N) * share))]
    total = advantage_N.sum()
    return torch.where(total > 0, top.sum() / total, share)
