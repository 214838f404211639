"""Routing: which responses the distillation term applies to, as a factor in [0, 1]."""

from __future__ import annotations


def failed(reward: float) -> float:
    """1 - r: distil where the response failed (VOLD Eq. 6, reward-guided masking)."""
    return 1.0 - reward


def every(reward: float) -> float:
    """Distil every response (VOLD Eq. 5; OPD)."""
    return 1.0


def nowhere(reward: float) -> float:
    """No teacher (GRPO)."""
    return 0.0
