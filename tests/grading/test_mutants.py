"""Nothing equals a gold answer but the gold answer: mutants of real golds, and responses without the gold's value.

The golds are those of MATH-500 and GSM8K where shared/data is at hand, else `GOLDS`, which are of our own making.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vold.grading import equal, extract_answer
from vold.grading.equality import Undecided, decide

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
COUNT, SEED = 5000, 16
GOLDS = [
    *("7", "-12", "1,234", "0.25", "3.5", r"\ln 3"),
    *(r"\frac{3}{4}", r"-\frac{7}{2}", r"2\frac{1}{3}", "10^6", "5!", "101_2", "3:4"),
    *("12 cm", r"15\text{ cm}^2", r"\$36", r"50\%", r"90^\circ", "60 km/h", "yes", r"\text{even}", "B", "(C)"),
    *(r"12\sqrt{3}", r"\frac{\sqrt{2}}{2}", r"3+4\sqrt{5}", r"2\pi", r"\frac{\pi}{6}", "1+2i", "6-5i", "e^2"),
    *("x^2+3x+2", "(x+1)(x-4)", "2x+1", r"\frac{x+1}{x-2}", "5r^5", "3ab-2", "y=2x+1", "x=7", "f(x)=x^2-1", "x-2y+3=0"),
    *("x^2+y^2=25", "(3,4)", "(-1,2,5)", "[1,2)", r"(-\infty,3)", r"(0,1)\cup(2,5)", r"\{1,2,3\}", "1,2,5", "x=1, y=2"),
    *(r"x\ge 2", "-2<x<7", r"x\ne 3", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "a_3", r"\binom{5}{2}", "2^{10}-1"),
]  # fmt: skip
SIGNS = {
    "+": "-", "-": "+", "<": ">", ">": "<", r"\le": "<", r"\ge": ">", r"\cup": r"\cap", r"\cdot": "+", r"\times": "-",
    "/": "+", "^": "+", "(": "[", ")": "]", "[": "(", "=": "+", ":": "+", "!": "", "_": "^",
}  # fmt: skip
SIGN = re.compile(
    "|".join(map(re.escape, sorted(SIGNS, key=len, reverse=True))) + r"|[0-9]|(?<![A-Za-z\\])[a-z](?![A-Za-z])"
)


def golds() -> list[str]:
    """Real golds where they are at hand, deep towers left out."""
    if not SHARED.is_dir():
        return GOLDS
    math = [row["final_answer"] for row in json.loads((SHARED / "math500.json").read_text(encoding="utf-8"))]
    lines = (SHARED / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [*math, *(json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines), *GOLDS]


def mutant(gold: str, rng: random.Random) -> str | None:
    """`gold` with one digit, sign, operator, bracket or variable changed, dropped or added."""
    places = list(SIGN.finditer(gold))
    if not places:
        return None
    place, sign = (chosen := rng.choice(places)), chosen.group()
    if sign.isdigit():
        other = rng.choice([digit for digit in "0123456789" if digit != sign])
        change = rng.choice([other, sign + other, "", f"-{sign}", f".{sign}"])
    elif sign.isalpha():
        change = rng.choice([rng.choice("pqwz"), f"2{sign}", f"{sign}^2", f"-{sign}"])
    else:
        change = rng.choice([SIGNS[sign], ""]) if sign in "+-" else SIGNS[sign]
    return gold[: place.start()] + change + gold[place.end() :]


def plain(text: str) -> str:
    """The listed equivalences: -0 is 0, .25 is 0.25 and 5.40 is 5.4."""
    text = re.sub(r"-(?=0(?![0-9.]))", "", text)
    return re.sub(r"(?<![0-9])0*([0-9]*)(\.[0-9]*?)0*(?![0-9])", lambda m: f"{m[1] or 0}{m[2]}".rstrip("."), text)


@cache
def accepted(answer: str, gold: str) -> bool:
    try:
        return equal(answer, gold)[0]
    except Exception:
        return False  # what raises is wrong, as in a worker


def test_no_mutant_of_a_gold_is_accepted():
    rng, pool, wrong, tried = random.Random(SEED), golds(), [], 0
    while tried < COUNT:
        gold = rng.choice(pool)
        answer = mutant(gold, rng)
        if answer is None or len(re.findall("[0-9]{5,}!|[0-9]{4,}}?\\^", answer)):
            continue
        tried += 1
        if accepted(answer, gold) and plain(answer) != plain(gold):
            wrong.append((gold, answer))
    assert not wrong, f"{len(wrong)} of {COUNT} mutants accepted: {wrong[:20]}"


WORDS = st.sampled_from(
    ["cm", "apples", r"\text{ not }", "or", "and", "%", r"\%", "$", r"\$", "=", "x", r"\pi", "i", "e"]
)
NUMBERS = st.integers(-99, 99).map(str)
OPERATORS = st.sampled_from(
    ["+", "-", "*", "/", r"\cdot ", ",", ";", ":", "^2", "(", ")", "[", "]", r"\{", r"\}", "<", r"\le "]
)
RESPONSES = st.lists(NUMBERS | OPERATORS | WORDS, max_size=7).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    RESPONSES,
    st.sampled_from(["104729", "-104729", "104729 cm", r"\frac{104729}{7}", "x=104729", "(104729,1)", r"104729\%"]),
)
def test_no_response_without_the_value_of_the_gold_is_accepted(content, gold):
    """Seven small numbers and signs cannot make 104729, a prime."""
    answer = extract_answer(rf"\boxed{{{content}}}")
    assert answer is None or not accepted(answer, gold), (answer, gold)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=30).filter(lambda text: "7" not in text and not any(c.isnumeric() for c in text)))
def test_no_text_without_a_number_is_seven(content):
    answer = extract_answer(rf"\boxed{{{content}}}") or ""
    outcome = decide(answer, "7")
    assert outcome[0] is False if not isinstance(outcome, Undecided) else not accepted(answer, "7")
