"""Form, majority and batches, by hand."""

from __future__ import annotations

import re

import pytest

from vold.config.schema import AnswersConfig, PoseConfig
from vold.grading import Grader
from vold.selfplay.questions import Vote, find_question, is_informative, solver_batches, vote

PATTERN = re.compile(PoseConfig().pattern, re.DOTALL)


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


@pytest.mark.parametrize(
    ("response", "question"),
    [
        ("<think>hm</think><question>\n What is 2+2? </question>", "What is 2+2?"),
        ("<question>a</question> or <question>b\nc</question>", "b\nc"),
        ("<question>   </question>", None),
        ("<question>never closed", None),
        ("What is 2+2?", None),
    ],
)
def test_form(response, question):
    assert find_question(response, PATTERN) == question


def test_majority_groups_equal_answers(grader):
    """1/2, 0.5 and \\frac{1}{2} are one answer, and together more than the two 2s."""
    answers = [["2", r"\frac{1}{2}", "0.5", None, "2", "1/2"], [None, None], ["3", "4"], ["x", "7", "7.0", "7"]]
    first, second, third, fourth = vote(answers, grader)
    assert first.agreement == pytest.approx(3 / 6) and first.label == r"\frac{1}{2}"
    assert second == Vote("", 0.0)
    assert third == Vote("3", 0.5), "of equally many the shortest, then the first by its characters"
    assert fourth == Vote("7", 0.75)


def test_the_vote_depends_on_no_order_and_its_labels_are_normal_forms(grader):
    answers = ["x = 2/4", "0.5", r"\dfrac{1}{2}", "1/2", "3", "3.0", "7"]
    orders = [answers, answers[::-1], sorted(answers), answers[3:] + answers[:3]]
    assert vote(orders, grader) == [Vote(r"\frac{1}{2}", pytest.approx(4 / 7))] * 4
    assert vote([["4", "3"], ["3", "4"]], grader) == [Vote("3", 0.5)] * 2
    assert vote([["x=14/2", r"$7$", "7.00"]], grader) == [Vote("7", 1.0)]


def test_answers_that_could_not_be_a_label_count_against_agreement(grader):
    assert vote([["{{", "", "5", "5" * 5000]], grader) == [Vote("5", 0.25)]


@pytest.mark.parametrize(("agreeing", "kept"), [(0, False), (2, False), (3, True), (7, True), (8, False), (10, False)])
def test_kept_are_questions_with_three_to_seven_of_ten(agreeing, kept):
    assert is_informative(Vote("4", agreeing / 10), AnswersConfig()) is kept


def test_nothing_is_kept_without_an_answer():
    assert not is_informative(Vote("", 0.0), AnswersConfig(lowest=0))


def test_thirty_percent_of_every_batch_are_old():
    fresh, old = [f"new{n}" for n in range(9)], [f"old{n}" for n in range(4)]
    rows = solver_batches(fresh, old, steps=6, per_step=10, replay=0.3, seed=1)
    batches = [rows[k : k + 10] for k in range(0, 60, 10)]
    assert [sum(row.startswith("old") for row in batch) for batch in batches] == [3] * 6
    seen = [row for row in rows if row.startswith("new")]
    assert sorted(seen[:9]) == sorted(fresh) and sorted(seen[9:18]) == sorted(fresh), "each once before any twice"
    assert rows == solver_batches(fresh, old, steps=6, per_step=10, replay=0.3, seed=1)
    assert rows != solver_batches(fresh, old, steps=6, per_step=10, replay=0.3, seed=2)


def test_the_first_iteration_has_nothing_to_replay():
    rows = solver_batches(["a", "b"], [], steps=3, per_step=4, replay=0.3, seed=0)
    assert len(rows) == 12 and set(rows) == {"a", "b"}
