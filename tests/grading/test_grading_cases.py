"""The public table, cases/*.jsonl, graded as training grades: rows `vold grade` reads as they are.

Each holds id, gold, response, the verdict a strict and fair mathematician gives, the rule that must decide it, and why.
"known limit" marks the few where the grader is stricter than the mathematician. It is never more lenient. A row may
have the texts of choices, and the prompt that was asked.
"""

import json
from pathlib import Path

import pytest

from vold.grading import Grader, Item, equal, extract_answer, pool, validate_gold

FILES = sorted((Path(__file__).parent / "cases").glob("*.jsonl"))
CASES = [json.loads(line) for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
HOSTILE = [case for case in CASES if case["id"].startswith("adversarial")]
HONEST = [case for case in CASES if case not in HOSTILE]


def item(case):
    choices, prompt = tuple(case.get("choices", ())), case.get("prompt", "")
    return Item(case["response"], case["gold"], choices=choices, problem=prompt)


def graded(cases, seconds):
    with Grader(workers=2, seconds=seconds) as grader:
        verdicts = grader.grade([item(case) for case in cases])
    return {case["id"]: verdict for case, verdict in zip(cases, verdicts, strict=True)}


@pytest.fixture(scope="module")
def verdicts():
    """Of all cases, from two runs: hostile answers get less time, and on a busy machine wait for their turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_PATIENCE", 200)
        return graded(HONEST, 10) | graded(HOSTILE, 1.5)


def test_the_table_is_a_table():
    assert len(CASES) >= 200
    assert len({case["id"] for case in CASES}) == len(set(map(item, CASES))) == len(CASES)
    assert {"correct", "wrong", "broken"} == {case["verdict"] for case in CASES}
    assert all(case["why"] for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case, verdicts):
    found = verdicts[case["id"]]
    assert (found.outcome, found.rule) == (case["verdict"], case["rule"]), (case, found)


def test_every_gold_grades_itself():
    for gold in {case["gold"] for case in HONEST if case["verdict"] != "broken"}:
        assert validate_gold(gold)
        assert equal(extract_answer(rf"\boxed{{{gold}}}"), gold)[0], gold


def test_the_record(verdicts):
    found = next(verdicts[c["id"]] for c in CASES if c["gold"] == "5 cm" and c["response"] == r"\boxed{50 mm}")
    assert (found.outcome, found.extracted, found.gold, found.rule) == ("wrong", "50 mm", "5 cm", "units")
    assert 0 < found.seconds < 1


@pytest.mark.parametrize(
    "gold",
    [
        *("", "  ", "$ $", r"\boxed{}", r"\frac{1}{2", "}{", "9" * 5000, None, 7, r"7 \boxed{8}", "<think>7"),
        *("a</think>b", "nan", "NaN", r"\text{nan}", "<NA>", "NaT", "null", "N/A"),
    ],
)
def test_unusable_gold(gold):
    with pytest.raises(ValueError) as error:
        validate_gold(gold)
    assert "\n" not in str(error.value)


def test_equal_is_its_truth_value_in_an_if():
    assert equal("1/2", "0.5") and not equal("1", "2")
    is_equal, rule = equal("1", "2")
    assert is_equal is False and isinstance(rule, str)
