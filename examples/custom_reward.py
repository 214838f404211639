"""Rewards of your own, in the four forms that `reward.function` takes (docs/rewards.md).

    vold rl vold/miniature/configs/rl.yaml reward.function=examples/custom_reward.py:few_steps objective.preset=grpo

Each function is called in worker processes that import this file, with the arguments that it names. It returns a
number, or a dict with "score" and further numbers to log. What it raises is shown and counted, and masks the response.
"""

from __future__ import annotations

import asyncio

from vold.grading import equal, extract_answer


def few_steps(response_text: str, gold: str, finish_reason: str) -> dict[str, float]:
    """A right answer counts 1, less a tenth for each line of reasoning beyond the first; a wrong one counts 0."""
    answer = extract_answer(response_text)
    right = answer is not None and finish_reason == "stop" and equal(answer, gold)[0]
    lines = response_text.count("\n") + 1
    return {"score": max(1.0 - 0.1 * (lines - 1), 0.0) if right else 0.0, "right": right, "lines": lines}


def shortest(response_texts: list[str]) -> list[float]:
    """All responses to a prompt at once, as plural names ask for: 1 for the shortest of them, 0 for the longest."""
    lengths = [len(text) for text in response_texts]
    span = max(lengths) - min(lengths)
    return [(max(lengths) - length) / span if span else 0.0 for length in lengths]


async def looked_up(response_text: str, metadata: dict) -> float:
    """Awaited for all responses to a prompt together; metadata has the data's other columns."""
    await asyncio.sleep(0.0)  # here: a request to a service
    return float(metadata["topic"] in response_text)
