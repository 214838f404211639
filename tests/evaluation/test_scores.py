"""Evaluation numbers against ones worked out by hand, and which letter a response chose."""

from __future__ import annotations

import math

import pytest

from vold.evaluation.evaluator import text_to_grade
from vold.evaluation.scores import summarise
from vold.types import Prompt, Rollout


def row(problem, reward, extracted="1", tokens=10, finish_reason="stop", category=""):
    return {
        "prompt_id": problem,
        "reward": reward,
        "extracted": extracted,
        "response_tokens": tokens,
        "finish_reason": finish_reason,
        "category": category,
    }


def test_one_greedy_answer_each():
    rows = [row("a", 1.0, tokens=4), row("b", 0.0, tokens=8, finish_reason="length"), row("c", 1.0), row("d", None)]
    found = summarise(rows)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["stderr"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert (found["n"], found["k"], found["broken"], found["truncated"]) == (3, 1, 1, 0.25)
    assert (found["mean_length"], found["median_length"], found["p95_length"]) == (8, 9, 10)
    assert "majority" not in found and "categories" not in found


def test_several_answers_each():
    """a: two of three right; b: the wrong answer wins the vote; c: a tie, the first one counts; d: nobody answered."""
    rows = [row("a", 1.0, "7"), row("a", 0.0, "8"), row("a", 1.0, "7")]
    rows += [row("b", 0.0, "2"), row("b", 1.0, "3"), row("b", 0.0, "2")]
    rows += [row("c", 1.0, "5"), row("c", 0.0, "6"), row("c", None, "6")]
    rows += [row("d", 0.0, None)] * 3
    found = summarise(rows)
    means = [2 / 3, 1 / 3, 1 / 2, 0.0]
    mean = sum(means) / 4
    deviation = math.sqrt(sum((m - mean) ** 2 for m in means) / 3)
    assert found["accuracy"] == pytest.approx(mean) and found["stderr"] == pytest.approx(deviation / 2)
    assert found["majority"] == 0.5 and found["majority_stderr"] == pytest.approx(0.25)
    assert (found["n"], found["k"], found["broken"]) == (4, 3, 1)


def test_by_category_and_by_skill():
    rows = [row("a", 1.0, category="coarse perception"), row("b", 0.0, category="coarse perception")]
    rows += [row("c", 1.0, category="math"), row("d", 1.0, category="logical reasoning"), row("e", 0.0)]
    found = summarise(rows)
    assert {name: (one["accuracy"], one["n"]) for name, one in found["categories"].items()} == {
        "coarse perception": (0.5, 2),
        "logical reasoning": (1.0, 1),
        "math": (1.0, 1),
    }
    assert {name: (one["accuracy"], one["n"]) for name, one in found["skills"].items()} == {
        "perception": (0.5, 2),
        "reasoning": (1.0, 2),
    }
    assert "skills" not in summarise([row("c", 1.0, category="math")]), "a set of its own may also say math"


def test_no_rows():
    assert summarise([])["accuracy"] == 0.0 and summarise([row("a", None)])["n"] == 0


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
    assert text_to_grade(rollout) == (text if letter is None else f"\\boxed{{{letter}}}")
    free = Rollout(Prompt("p", (), "", gold="12 cm"), (1,), (0.0,), "stop", text)
    assert text_to_grade(free) == text
