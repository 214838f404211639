"""Which option a response chooses, and where the grader reads the response as it is."""

import pytest

from vold.grading import judged_text
from vold.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so \boxed{B}", None),  # the grader reads it as it is
        (r"so \boxed{12 cm}", "B"),
        (r"so \boxed{99}", None),
        ("<think>Answer: A</think>The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("Answer: **B**", "B"),
        ("Answer: A\nNo. The correct answer is option B", "B"),
        ("B", "B"),
        ("(C)", "C"),
        ("B. 12 cm", "B"),
        ("A triangle has three sides", None),
        ("the answer is A triangle", None),
        ("the answer is D", None),  # there are three options
        ("<think>Answer: B", None),
    ],
)
def test_the_letter_that_was_chosen(text, letter):
    prompt = Prompt("p", (), "", gold="B", choices=("7 cm", "12 cm", "9 cm"))
    rollout = Rollout(prompt, (1,), (0.0,), "stop", text)
    assert judged_text(rollout) == (text if letter is None else f"\\boxed{{{letter}}}")
    free = Rollout(Prompt("p", (), "", gold="12 cm"), (1,), (0.0,), "stop", text)
    assert judged_text(free) == text
