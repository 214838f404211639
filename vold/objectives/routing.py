"""Routing: which responses the distillation term applies to, as factors in [0, 1]. G: responses per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Route = Callable[[Sequence[float]], list[float]]
"""rewards_G -> factors_G of the distillation term"""


def failed(rewards_G: Sequence[float]) -> list[float]:
    """1 - r: distil where the response failed (VOLD Eq. 6, reward-guided masking; KDRL's response-level mask)."""
    return [1.0 - reward for reward in rewards_G]


def every(rewards_G: Sequence[float]) -> list[float]:
    """Distil every response (VOLD Eq. 5; OPD; KDRL without mask)."""
    return [1.0] * len(rewards_G)


def failed_groups(rewards_G: Sequence[float]) -> list[float]:
    """Distil where no response of the prompt succeeded at all (KDRL's group-level mask)."""
    return [float(not any(rewards_G))] * len(rewards_G)


def nowhere(rewards_G: Sequence[float]) -> list[float]:
    """No teacher (GRPO)."""
    return [0.0] * len(rewards_G)


ROUTES: dict[str, Route] = {"nowhere": nowhere, "every": every, "failed": failed, "failed-groups": failed_groups}
