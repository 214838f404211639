import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vold.grading import extract_answer
from vold.grading.equality import decide

PIECES = st.lists(
    st.sampled_from(
        ["\\boxed", "\\boxed{", "{", "}", "\\{", "\\", "<think>", "</think>", " ", "7", "$", "=", "\\text{"]
    )
    | st.text(max_size=5)
).map("".join)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("no box", None),
        (r"\boxed{7}", "7"),
        ("\\boxed \n {7}", "7"),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"{ \boxed{7}", "7"),
        (r"} \boxed{7} }", "7"),
        (r"\boxed{3 + \boxed{7}}", "7"),
        (r"\boxed{7} \boxed{8", "7"),
        (r"\boxed{7", None),
        (r"a \\boxed{7}", None),
        (r"<think>\boxed{7}</think>", None),
        (r"<think>\boxed{7}", None),
        (r"\boxed{3}</think>\boxed{7}", "7"),
        (r"<think>a</think>\boxed{7}<think>", None),
        (r"<think></think><think>\boxed{3}</think>\boxed{7}", "7"),
        (r"\boxed{}", ""),
    ],
)
def test_extract(response, answer):
    assert extract_answer(response) == answer


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_never_raises(response):
    answer = extract_answer(response)
    assert answer is None or answer in response


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES)
def test_the_policy_never_raises(answer, gold):
    decide(answer, gold)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789+-x/()^ ", min_size=1))
def test_a_box_is_found_wherever_it_stands(answer):
    assert extract_answer(rf"<think>\boxed{{1}}</think> {{ so }} \boxed{{{answer}}} \boxed{{") == answer.strip()


@pytest.mark.parametrize("unit", ["{", "\\boxed{", "\\", "}", "\\boxed ", "<think>", "</think>\\boxed{"])
def test_a_megabyte_takes_a_second(unit):
    before = time.process_time()
    extract_answer(unit * (10**6 // len(unit)))
    extract_answer("\\boxed{" + unit * (10**6 // len(unit)) + "}")
    assert time.process_time() - before < 4


@pytest.mark.parametrize("unit", ["cm ", "hours ", "\\text{", "1,", "$5", "°", "=", "A.", "{,}", "\\frac1", "ﷺ"])
def test_the_policy_is_linear(unit):
    before = time.process_time()
    decide("5 " + unit * (4000 // len(unit)) + "!", "7 cm")
    assert time.process_time() - before < 1
