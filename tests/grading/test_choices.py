"""Which option a response commits to; the table cases/options.jsonl has more."""

import pytest

from vold.grading import Grader, Item
from vold.grading.choices import choose
from vold.types import Prompt, Rollout

CHOICES = ("7 cm", "12 cm", "9 cm")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so \boxed{B}", "B"),
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
        (r"\boxed{B} or \boxed{C}", None),
        ("<answer>B</answer> <answer>C</answer>", None),
        ("If the answer is B, then x = 3.", None),
        ("The answer is B, not C.", None),
        ("The answer cannot be B.", None),
        ("Is the answer B?", None),
        ("The answer is either B or C.", None),
        ("Answer: B\nAnswer: C", "C"),
        ("The answer is B.\nA triangle like this is right-angled.", "B"),
        ("正确答案是B。", "B"),
        ("I choose (B) because 12 is even.", "B"),
    ],
)
def test_the_letter_that_was_chosen(text, letter):
    chosen = choose(text, CHOICES)
    assert (chosen.letter if chosen else None) == letter


def test_an_option_s_text_is_compared_as_any_answer_is():
    responses = [
        r"\boxed{12 cm}",
        r"\boxed{12}",
        r"\boxed{12.0\text{ cm}}",
        r"\boxed{9}",
        r"\boxed{99}",
        r"\boxed{C. 12}",
    ]
    with Grader(workers=1) as grader:
        verdicts = grader.grade([Item(response, "B", choices=CHOICES) for response in responses])
        assert [verdict.outcome for verdict in verdicts] == ["correct"] * 3 + ["wrong"] * 3
        twins = Item(r"\boxed{7}", "A", choices=("7 cm", "7 m"))
        surds = (r"\sqrt{12}", r"\sqrt{13}")
        found = grader.grade(
            [twins, twins._replace(response=r"\boxed{7 cm}"), Item(r"\boxed{2\sqrt{3}}", "A", choices=surds)]
        )
        assert [verdict.outcome for verdict in found] == ["wrong", "correct", "correct"]


def test_training_and_evaluation_grade_the_same_item():
    prompt = Prompt("p", (), "Which? A. 7 cm B. 12 cm C. 9 cm", gold="B", choices=CHOICES)
    item = Item.of(Rollout(prompt, (1,), (0.0,), "length", "The answer is (B)."))
    assert item == Item("The answer is (B).", "B", True, CHOICES, prompt.text)
    with Grader(workers=1) as grader:
        cut, whole = grader.grade([item, item._replace(truncated=False)])
    assert (cut.rule, whole.outcome, whole.extracted) == ("truncated", "correct", "B")
