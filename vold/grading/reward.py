"""A response's reward: the answer's correctness and the required form."""

from __future__ import annotations

import re
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
    """In [0, 1]; None where the grader broke. A truncated response, whose verdict is wrong, has no form either."""
    if verdict.outcome == "broken":
        return None
    formed = rollout.finish_reason != "length" and well_formed(rollout.text)
    return config.accuracy * (verdict.outcome == "correct") + config.format * formed
