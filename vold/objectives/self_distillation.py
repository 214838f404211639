"""Self-distillation (SDPO, SRPO): the teacher is the moving average of the student's weights, which reads a correct
sibling's answer, or what is wrong with the response, beside the problem.

G: responses of a prompt, n: tokens with a KL term in one update, over all ranks.
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
class SelfDistillation:
    """Settings of a student that teaches itself.

    rate        of the moving average: w += rate (student - w) after each step
    confident   weight each token's KL by exp(-H) of the self-teacher, divided by its mean in the update (SRPO)
    feedback    the self-teacher of a failed response without a correct sibling reads what is wrong with it; with one
                it reads the sibling alone, as in SDPO's published code (environment_feedback_only_without_solution)

    What is right is the objective's to say: by the grader, or by a term of the user's own.
    """

    rate: float = 0.05
    confident: bool = False
    feedback: bool = False

    def hints(
        self, rollouts: Sequence[Rollout], right_G: Sequence[float], feedback_G: Sequence[str | None]
    ) -> list[Hint | None]:
        """The hint for each response of a prompt, right_G in [0, 1]. None: there is none, and the response gets no KL
        term."""
        hints = []
        for right, sibling, words in zip(right_G, correct_sibling(right_G), feedback_G, strict=True):
            demonstration = None if sibling is None else without_thinking(rollouts[sibling].text)
            feedback = words if self.feedback and right < 1.0 and demonstration is None else None
            hints.append(None if demonstration is None and feedback is None else Hint(demonstration, feedback))
        return hints


def correct_sibling(right_G: Sequence[float]) -> list[int | None]:
    """[G] index of the first other right response (SDPO); None where there is none."""
    correct = [index for index, right in enumerate(right_G) if right == 1.0]
    return [next((sibling for sibling in correct if sibling != index), None) for index in range(len(right_G))]


def feedback_on(verdict: Verdict) -> str | None:
    """A sentence on what is wrong with a response, by its verdict and without the right answer; None if it is right."""
    if verdict.outcome == "correct":
        return None
    reason = _REASONS.get(verdict.rule, "The answer is wrong.")
    return f"{reason} It was: {verdict.extracted[:_LONGEST_ANSWER]}" if verdict.extracted else reason


def without_thinking(text: str) -> str:
    """The part of a response after its last </think>."""
    return text.rpartition("</think>")[2].strip()


def confidence(entropy_n: Tensor) -> Tensor:
    """exp(-H) of the self-teacher at each token: SRPO's weights, before a division by their mean over the n tokens of
    the update makes that mean 1."""
    return (-entropy_n).exp()
