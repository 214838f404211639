"""SDPO and SRPO: the student learns from its own average, which is shown how a sibling solved the problem, or told
what was wrong with the response.

G: responses of a prompt, n: tokens that are distilled in one update, over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vold.types import Hint, Rollout, Verdict

_LONGEST_ANSWER = 200  # characters of a wrong answer that are repeated
_REASONS = {
    "truncated": "The response was cut off before it ended.",
    "no_answer": "The response has no final answer in \\boxed{}.",
    "timeout": "The answer took too long to check.",
    "unparsed": "The answer is not a mathematical expression.",
    "chain": "The answer does not commit to one value.",
}


@dataclass(frozen=True)
class SelfTeaching:
    """rate: of the average, w += rate (student - w) a step. confident: a token counts exp(-H) of the self-teacher, over
    the mean of that in the update (SRPO). feedback: failed responses are told what is wrong with them."""

    rate: float = 0.05
    confident: bool = False
    feedback: bool = False

    def hints(self, responses: Sequence[tuple[Rollout, Verdict]]) -> list[Hint | None]:
        """What the self-teacher of each of a prompt's responses is shown; None: nothing, and it does not teach it."""
        siblings_G = correct_sibling([float(verdict.outcome == "correct") for _, verdict in responses])
        hints = []
        for (_, verdict), sibling in zip(responses, siblings_G, strict=True):
            shown = None if sibling is None else without_thinking(responses[sibling][0].text)
            told = feedback_on(verdict) if self.feedback else None
            hints.append(None if shown is None and told is None else Hint(shown, told))
        return hints


def correct_sibling(right_G: Sequence[float]) -> list[int | None]:
    """The first other right response, as SDPO shows it; a response is never shown itself."""
    correct = [place for place, right in enumerate(right_G) if right == 1.0]
    return [next((sibling for sibling in correct if sibling != place), None) for place in range(len(right_G))]


def feedback_on(verdict: Verdict) -> str | None:
    """What is wrong with a response, as the grader found it, without the right answer; None where nothing is."""
    if verdict.outcome == "correct":
        return None
    reason = _REASONS.get(verdict.rule, "The answer is wrong.")
    return f"{reason} It was: {verdict.extracted[:_LONGEST_ANSWER]}" if verdict.extracted else reason


def without_thinking(text: str) -> str:
    """What a response says after its last </think>: the demonstration, not the way to it."""
    return text.rpartition("</think>")[2].strip()


def confidence(entropy_n: Tensor) -> Tensor:
    """exp(-H) of the self-teacher at each token: SRPO's weights, before a division by their mean over the n tokens of
    the update makes that mean 1."""
    return (-entropy_n).exp()
