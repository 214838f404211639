"""Advantages of the G responses of one prompt. G: responses per prompt."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

Advantage = Callable[[Sequence[float]], list[float]]
"""rewards_G -> advantages_G; exactly 0 where a response has nothing to learn from its siblings."""

DELTA = 1e-6  # paper, section 3.1: "a small constant for numerical stability"; its value is table 4's


def group_normalised(rewards_G: Sequence[float]) -> list[float]:
    """A_i = (r_i - mean r) / (std r + delta), unbiased std (GRPO; VOLD section 3.1). Equal rewards give exactly 0."""
    if len(set(rewards_G)) < 2:
        return [0.0] * len(rewards_G)
    mean, std = statistics.fmean(rewards_G), statistics.stdev(rewards_G)
    return [(reward - mean) / (std + DELTA) for reward in rewards_G]


def mean_centred(rewards_G: Sequence[float]) -> list[float]:
    """A_i = r_i - mean r (Dr.GRPO): a division by the std would favour prompts that are nearly solved or hopeless."""
    if len(set(rewards_G)) < 2:
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def none(rewards_G: Sequence[float]) -> list[float]:
    """No policy gradient: on-policy distillation alone."""
    return [0.0] * len(rewards_G)


ADVANTAGES: dict[str, Advantage] = {"group-normalised": group_normalised, "mean-centred": mean_centred, "none": none}
