"""Rules for two single values that need no parser: words, bases, ratios, units, number literals, stray marks."""

from __future__ import annotations

import re
from collections.abc import Callable

from vold.grading import literals
from vold.grading.structure import tight
from vold.grading.units import Quantity, quantity, same_unit

Decision = tuple[bool, str]
Rule = Callable[[str, str], bool | None]

_BASED = re.compile(r"(?<![A-Za-z0-9_^{\\])(?:[0-9][0-9A-Z]*|\([0-9A-Z]+\))_(?:\{[0-9]+\}|[0-9])")
_RATIO = re.compile(r"[0-9}]\s?:\s?[\\0-9-]")
_SIDE_BY_SIDE = re.compile(r"(?<![_^])[0-9] [0-9]")
_MARKS = (r"\%", r"\$", r"^\circ", "€", "£", "¥", "₹", "'", r"\ldots")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_INVERSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?:_\{[^{}]*\}|_[A-Za-z0-9])?\s?\^\s?\{\s?-\s?1\s?\}\s?\(")
_TWO_LETTER_WORDS = frozenset(
    [
        "ad",
        "ah",
        "am",
        "an",
        "as",
        "at",
        "ax",
        "be",
        "by",
        "do",
        "go",
        "ha",
        "he",
        "hi",
        "ho",
        "id",
        "if",
        "in",
        "is",
        "it",
        "la",
        "lo",
        "ma",
        "me",
        "my",
        "no",
        "of",
        "oh",
        "ok",
        "on",
        "or",
        "ow",
        "ox",
        "pa",
        "so",
        "to",
        "up",
        "us",
        "we",
        "ye",
    ]
)


def scalar_rules(answer: str, gold: str) -> tuple[Decision | None, str, str]:
    """(decision or None, answer, gold): without a decision, the texts without agreed units are for algebra."""
    decision = first(_SPELLING_RULES, answer, gold)
    if decision is not None:
        return decision, answer, gold
    ours, theirs = quantity(answer), quantity(gold)
    if "percent" in (ours.unit, theirs.unit) and ours.unit != theirs.unit:
        return (_same_percentage(ours, theirs), "percent"), answer, gold
    match same_unit(ours, theirs):
        case False:
            return (False, "units"), answer, gold
        case True:
            answer, gold = ours.value, theirs.value
    return first(_VALUE_RULES, answer, gold), answer, gold


def first(rules: tuple[Rule, ...], answer: str, gold: str) -> Decision | None:
    """The decision of the first rule that has one."""
    for rule in rules:
        verdict = rule(answer, gold)
        if verdict is not None:
            return verdict, rule.__name__.strip("_")
    return None


def empty(answer: str, gold: str) -> bool | None:
    """Nothing equals no answer."""
    return None if answer else False


def identical(answer: str, gold: str) -> bool | None:
    """Equal spellings, whatever the spaces beside signs."""
    return True if answer == gold or tight(answer) == tight(gold) else None


def words(answer: str, gold: str) -> bool | None:
    """Words are equal letter by letter, whatever their case; single letters keep it. `no` is not `on`; `mn`, which is
    no word, is the product `nm`."""
    answer_is_words, gold_is_words = _is_words(answer), _is_words(gold)
    if answer_is_words and gold_is_words:
        same_product = (
            _is_product(answer)
            and _is_product(gold)
            and sorted(answer.replace(" ", "")) == sorted(gold.replace(" ", ""))
        )
        return same_product or _spell(answer) == _spell(gold)
    if gold_is_words:
        return None if len(gold) == 1 or _is_product(gold) else False
    if answer_is_words and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", gold)):
        return False
    return None


def _is_words(text: str) -> bool:
    parts = re.split(r"[ '-]", _TEXT.sub(r"\1", text))
    if "-" in text and min(map(len, parts)) < 3:  # x-y is a difference, north-east a word
        return False
    return all(part.isalpha() for part in parts if part) and any(parts)


def _is_product(text: str) -> bool:
    """Two or three letters that are no English word: `ab`, `xyz`."""
    text = text.replace(" ", "") if re.fullmatch("[a-z](?: [a-z])+", text) else text
    if re.fullmatch("[a-z]{2}", text):
        return text not in _TWO_LETTER_WORDS
    return re.fullmatch("[b-df-hj-np-tv-z]{3}", text) is not None and ("y" not in text or bool(set("xz") & set(text)))


def _spell(text: str) -> str:
    text = " ".join(_TEXT.sub(r"\1", text).split())
    if len(text) == 1:
        return text
    return re.sub(r"([a-z]{3,}[^s])s\b", r"\1", text.casefold())  # no solutions, no solution


def _base(answer: str, gold: str) -> bool | None:
    """`101_2` is not `101_3`: digits and base compared as written."""
    if _BASED.search(answer) or _BASED.search(gold):
        return compact(answer) == compact(gold)
    return None


def _ratio(answer: str, gold: str) -> bool | None:
    """`3:30`, `1:2:3`: compared as written, neither reduced nor divided."""
    if _RATIO.search(answer) or _RATIO.search(gold):
        return compact(answer) == compact(gold)
    return None


def compact(text: str) -> str:
    """`text` without spaces, braces and round brackets, and without case."""
    return re.sub(r"[\s{}()]", "", text).casefold()


def _number(answer: str, gold: str) -> bool | None:
    return literals.compare(answer, gold)


def _mixed(answer: str, gold: str) -> bool | None:
    """`4 10/3` is no mixed number, nor a product: it is read as nothing."""
    return False if literals.is_improper(answer) or literals.is_improper(gold) else None


def _marks(answer: str, gold: str) -> bool | None:
    """Percent, degree, currency, dots and words *inside* a value must occur on both sides."""
    if any(answer.count(mark) != gold.count(mark) for mark in _MARKS):
        return False
    return None if sorted(_TEXT.findall(answer)) == sorted(_TEXT.findall(gold)) else False


def _side_by_side(answer: str, gold: str) -> bool | None:
    """`3 4` is two numbers; math-verify reads a mixed number and adds them to 7."""
    return False if _SIDE_BY_SIDE.search(answer) else None


def _inverse(answer: str, gold: str) -> bool | None:
    """`f^{-1}(x)` is the inverse function, not 1/f(x); `x^{-1}(y+1)` may be either, so both are compared as written."""
    return False if _INVERSE.search(answer) or _INVERSE.search(gold) else None


def _same_percentage(answer: Quantity, gold: Quantity) -> bool:
    """A percentage is its exact value: 50% is 0.5 and 1/2, neither 50 nor rounded."""
    values = [literals.rational(side.value) for side in (answer, gold)]
    if None in values or {answer.unit, gold.unit} != {"percent", ""}:
        return False
    ours, theirs = (v / 100 if s.unit else v for v, s in zip(values, (answer, gold), strict=True))
    return ours == theirs


_SPELLING_RULES: tuple[Rule, ...] = (empty, identical, words)
_VALUE_RULES: tuple[Rule, ...] = (
    empty, identical, words, _base, _ratio, _number, _mixed, _marks, _side_by_side, _inverse,
)  # fmt: skip
