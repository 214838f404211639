"""SDPO and SRPO: the student learns from its own average, which is shown how a sibling solved the problem.

G: responses of a prompt, n: tokens that are distilled in one update, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Demonstration = Callable[[Sequence[float]], list[int | None]]
"""rewards_G -> of each response, which sibling the self-teacher is shown, or None: it is not taught"""


def correct_sibling(rewards_G: Sequence[float]) -> list[int | None]:
    """The first other response with reward 1, as SDPO shows it; a response is never shown itself."""
    correct = [place for place, reward in enumerate(rewards_G) if reward == 1.0]
    return [next((sibling for sibling in correct if sibling != place), None) for place in range(len(rewards_G))]


@dataclass(frozen=True)
class SelfTeaching:
    """rate: of the average, w += rate (student - w) a step. confident: a token counts exp(-H) of the self-teacher, over
    the mean of that in the update (SRPO)."""

    demonstration: Demonstration = correct_sibling
    rate: float = 0.05
    confident: bool = False


def taught(rewards_G: Sequence[float]) -> list[float]:
    """SDPO's routing: every response that has a correct sibling."""
    return [float(sibling is not None) for sibling in correct_sibling(rewards_G)]


def failed_and_taught(rewards_G: Sequence[float]) -> list[float]:
    """SRPO's routing: a failed response with a correct sibling; all others are GRPO's."""
    return [float(reward < 1.0) * share for reward, share in zip(rewards_G, taught(rewards_G), strict=True)]


def without_thinking(text: str) -> str:
    """What a response says after its last </think>: the demonstration, not the way to it."""
    return text.rpartition("</think>")[2].strip()


def confidence(entropy_n: Tensor) -> Tensor:
    """exp(-H) of the self-teacher at each token: SRPO's weights, before a division by their mean over the n tokens of
    the update makes that mean 1."""
    return (-entropy_n).exp()
