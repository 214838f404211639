"""The case table, rule by rule; the same rows once through the pool, as training grades them."""

import pytest
from grading_cases import ANSWERS, RESPONSES

from vold.grading import Grader, equal, extract_answer, validate_gold


@pytest.mark.parametrize(("answer", "gold", "expected"), ANSWERS)
def test_answer(answer, gold, expected):
    verdict, rule = equal(answer, gold)
    assert verdict is expected, rule


@pytest.mark.parametrize(("response", "gold", "expected"), RESPONSES)
def test_response(response, gold, expected):
    answer = extract_answer(response)
    assert (answer is not None and equal(answer, gold)[0]) is expected, answer


def test_the_pool_agrees_with_equal():
    rows = RESPONSES + [(rf"\boxed{{{answer}}}", gold, expected) for answer, gold, expected in ANSWERS]
    with Grader(workers=1, seconds=10) as grader:
        verdicts = grader.grade([(response, gold, False) for response, gold, _ in rows])
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if v.outcome != ("correct" if row[2] else "wrong")]
    assert not wrong
    assert grader.counters == {"timeouts": 0, "respawns": 0, "broken": 0}


@pytest.mark.parametrize(
    ("answer", "gold", "rule"),
    [
        ("1=2=7", "7", "chain"),
        ("no", "on", "words"),
        ("D. 7", "D", "choice"),
        ("5 cm", "5 km", "units"),
        ("101_2", "101_3", "base"),
        ("3:30", "4:40", "ratio"),
        ("0.0000001", "0.0000003", "number"),
        ("3 4", "7", "side_by_side"),
        (r"\{1,2\}", "(1,2)", "brackets"),
        (r"3\times 10^{-7}", r"\sqrt{2}\times 10^{-7}", "math-verify"),
        (r"\frac{", r"\sqrt{2}", "unparsed"),
    ],
)
def test_the_rule_that_decided_is_named(answer, gold, rule):
    assert equal(answer, gold)[1] == rule


@pytest.mark.parametrize("gold", ["7", "D", r"\frac{1}{2}", "5 cm", r"\{1,2\}", "$x$"])
def test_usable_gold(gold):
    validate_gold(gold)
    assert equal(gold, gold)[0]


@pytest.mark.parametrize("gold", ["", "  ", "$ $", r"\boxed{}", r"\frac{1}{2", "}{", "9" * 5000, None, 7])
def test_unusable_gold(gold):
    with pytest.raises(ValueError) as error:
        validate_gold(gold)
    assert "\n" not in str(error.value)
