"""Routing: the responses that the KL term applies to, as factors in [0, 1]. G: responses per prompt.

right_G: success in [0, 1]: 1 for a right answer, else 0, whatever else the reward is made of; or the value of another
term (objective.routing_term).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Routing = Callable[[Sequence[float]], list[float]]
"""right_G -> factors_G of the KL term"""


def failed(right_G: Sequence[float]) -> list[float]:
    """1 - r: distil where the response failed (VOLD Eq. 6, reward-guided masking; KDRL's response-level mask)."""
    return [1.0 - right for right in right_G]


def every(right_G: Sequence[float]) -> list[float]:
    """Distil every response (VOLD Eq. 5; OPD; KDRL without mask)."""
    return [1.0] * len(right_G)


def failed_groups(right_G: Sequence[float]) -> list[float]:
    """Distil where no response of the prompt succeeded at all (KDRL's group-level mask)."""
    return [1.0 - max(right_G, default=0.0)] * len(right_G)


def nowhere(right_G: Sequence[float]) -> list[float]:
    """No teacher (GRPO)."""
    return [0.0] * len(right_G)


ROUTINGS: dict[str, Routing] = {"nowhere": nowhere, "every": every, "failed": failed, "failed-groups": failed_groups}
