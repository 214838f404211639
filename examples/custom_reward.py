r"""Rewards of your own, in the forms that `reward.function` takes (docs/rewards.md).

    vold rl vold/miniature/configs/rl.yaml objective.preset=grpo reward.function=examples/custom_reward.py:right_steps

Each function is called in worker processes that import this file, with the arguments that it names. It returns a
number, or a dict with "score" and further numbers to log. What it raises is shown and counted, and masks the response.
"""

from __future__ import annotations

import asyncio
import re

from vold.grading import extract_answer

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def right_steps(prompt: str, response_text: str) -> dict[str, float]:
    """A process reward for the miniature's arithmetic modulo 10: the share of lines that follow from the one before.
    Lines are whole remaining expressions, <think>7*9+5*3>..3+5*3>....8*3>......4</think>\\boxed{4}; the first must be
    the problem's, and the box holds the last. No gold answer is needed."""
    question = "".join(re.findall(r"[\d+*-]", re.sub(r"<w\d>", "", prompt)))
    thought = re.fullmatch(r"<think>(.*)</think>.*", response_text, re.DOTALL)
    lines = [line.strip(".") for line in thought[1].split(">")] if thought else []
    expected = [question]
    while len(expected[-1]) > 1:
        first, operation, second, *rest = expected[-1]
        expected.append(str(OPERATIONS[operation](int(first), int(second)) % 10) + "".join(rest))
    lines.append(extract_answer(response_text) or "")
    right = sum(line == answer for line, answer in zip(lines, [*expected, expected[-1]], strict=False))
    return {"score": right / (len(expected) + 1), "copied": float(lines[0] == question)}


def shortest(response_texts: list[str]) -> list[float]:
    """All responses to a prompt at once, as plural names ask for: 1 for the shortest of them, 0 for the longest."""
    lengths = [len(text) for text in response_texts]
    span = max(lengths) - min(lengths)
    return [(max(lengths) - length) / span if span else 0.0 for length in lengths]


async def mentions_topic(response_text: str, metadata: dict) -> float:
    """Awaited for all responses to a prompt together; metadata holds the columns of the data that nothing else
    reads."""
    await asyncio.sleep(0.0)  # here: a request to a service
    return float(metadata["topic"] in response_text)
