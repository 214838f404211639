"""Advantages of the G responses of one prompt. G: responses per prompt."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

Earlier = Sequence[Sequence[float]]
"""Rewards of the same prompt's responses at each earlier step that sampled any, without overlong penalties."""
Advantage = Callable[[Sequence[float], Earlier], list[float]]
"""(rewards_G, earlier) -> advantages_G; exactly 0 where a response has no policy gradient."""

DELTA = 1e-6  # paper, section 3.1: "a small constant for numerical stability"; the value is ours


def group_normalised(rewards_G: Sequence[float], earlier: Earlier = ()) -> list[float]:
    """A_i = (r_i - mean r) / (std r + delta), unbiased std (GRPO; VOLD section 3.1). Equal rewards give exactly 0."""
    return _standardised(rewards_G, rewards_G)


def smoothed(rewards_G: Sequence[float], earlier: Earlier = ()) -> list[float]:
    """DCPO's smooth advantage standardisation (Eq. 5 to 7). At the i-th step that draws responses to a prompt, with
    A_new standardised over this step's rewards and A_total over those of all i steps, of the two

        (i - 1)/i A_new + 1/i A_total   and   1/i A_new + (i - 1)/i A_total

    the one that is nearer to 0. At the first step both are group_normalised; later, equal rewards leave 1/i A_total.
    """
    steps = len(earlier) + 1
    new_G = _standardised(rewards_G, rewards_G)
    total_G = _standardised(rewards_G, [reward for rewards in (*earlier, rewards_G) for reward in rewards])
    pairs = [
        ((new + (steps - 1) * total) / steps, ((steps - 1) * new + total) / steps)
        for new, total in zip(new_G, total_G, strict=True)
    ]
    return [min(pair, key=abs) for pair in pairs]


def _standardised(rewards_G: Sequence[float], population: Sequence[float]) -> list[float]:
    if len(set(population)) < 2:
        return [0.0] * len(rewards_G)
    mean, std = statistics.fmean(population), statistics.stdev(population)
    return [(reward - mean) / (std + DELTA) for reward in rewards_G]


def mean_centred(rewards_G: Sequence[float], earlier: Earlier = ()) -> list[float]:
    """A_i = r_i - mean r (Dr.GRPO): dividing by the std would favour prompts that nearly always or never succeed."""
    if len(set(rewards_G)) < 2:
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def none(rewards_G: Sequence[float], earlier: Earlier = ()) -> list[float]:
    """No policy gradient: on-policy distillation alone."""
    return [0.0] * len(rewards_G)


def fixed_negative(rewards_G: Sequence[float], earlier: Earlier = ()) -> list[float]:
    """-1 for every token of every response, whatever the reward: the control of arXiv 2608.31046, which found that it
    matches the advantages that a teacher gives (log p_teacher - log p)."""
    return [-1.0] * len(rewards_G)


WITHOUT_REWARD = (fixed_negative, none)
ADVANTAGES: dict[str, Advantage] = {
    "group-normalised": group_normalised,
    "smoothed": smoothed,
    "mean-centred": mean_centred,
    "fixed-negative": fixed_negative,
    "none": none,
}
