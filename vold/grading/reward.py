"""A response's reward: the answer's correctness, the required form, and terms of one's own by their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vold.grading.extract import extract_answer

if TYPE_CHECKING:  # they import torch and pydantic, which a worker must not
    from vold.config.schema import RewardConfig
    from vold.types import Rollout, Verdict

_FORM = re.compile(r"\s*<think>.*</think>.*", re.DOTALL)


def well_formed(response: str) -> bool:
    """Reasoning in <think> tags, once, from the start, and a boxed answer behind it (EasyR1's rule, VLM-R1's with a box
    for its <answer>)."""
    once = response.count("<think>") == response.count("</think>") == 1
    return once and _FORM.fullmatch(response) is not None and extract_answer(response) is not None


def reward(rollout: Rollout, verdict: Verdict, config: RewardConfig) -> float | None:
    """Of answer and form alone, in [0, 1]; None where the grader broke."""
    return weighted_sum(answer_values(rollout, verdict), config.weights)


def answer_values(rollout: Rollout, verdict: Verdict) -> dict[str, float]:
    """accuracy, left out where the grader broke, and format. A truncated response, whose verdict is wrong, has no form
    either."""
    formed = rollout.finish_reason != "length" and well_formed(rollout.text)
    accuracy = {} if verdict.outcome == "broken" else {"accuracy": float(verdict.outcome == "correct")}
    return accuracy | {"format": float(formed)}


def weighted_sum(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Sum of weight x value over the terms that have a weight; None where the value of one is missing."""
    parts = [(weight, values.get(name)) for name, weight in weights.items() if weight]
    if any(value is None for _, value in parts):
        return None
    return sum(weight * value for weight, value in parts if value is not None)
