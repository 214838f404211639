r"""Number literals, compared exactly and without a parser: 7, -1,234.50, 3/4, \frac{3}{4}, 1e-7, 0.\overline{3}."""

from __future__ import annotations

import re
from fractions import Fraction

_DECIMAL = re.compile(r"([+-]?)\s?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_INTEGER = r"[+-]?\s?[0-9]{1,100}"
_RATIO = re.compile(rf"([+-]?)\s?\\frac\s?\{{({_INTEGER})\}}\s?\{{({_INTEGER})\}}|({_INTEGER})\s?/\s?({_INTEGER})")
_MIXED = re.compile(r"(-?)([0-9]{1,100})\s?\\frac\s?\{([0-9]{1,100})\}\{([0-9]{1,100})\}")
_SCIENTIFIC = re.compile(
    r"([+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?)(?:[eE]|\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?\{?)([+-]?[0-9]{1,3})\}?"
)
_REPEATING = re.compile(r"([+-]?)([0-9]{1,50})\.([0-9]{0,50})\\(?:overline|bar|dot)\s?\{([0-9]{1,50})\}")
_FRACTION_CHARS = 300


def decimal(text: str) -> str | None:
    """Canonical spelling of a decimal literal of any length (`-0,012.50` -> `-12.5`), None if it is not one.

    A string, never an int: Python refuses to convert thousands of digits, and a megabyte of them is an attack.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None or not any(c.isdigit() for c in text):
        return None
    sign, whole, part = match.group(1), match.group(2).replace(",", "").replace(" ", ""), match.group(3) or ""
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if sign == "-" and value != "0" else value


def rational(text: str) -> Fraction | None:
    """Exact value of a number literal, None if it is not one or is absurdly long."""
    if len(text) > _FRACTION_CHARS:
        return None
    plain = decimal(text)
    if plain is not None:
        return Fraction(plain)
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := _REPEATING.fullmatch(text):
        return _repeating(*match.groups())
    if is_improper(text):
        return None
    if match := _MIXED.fullmatch(text):
        return _signed(match[1], _quotient(f"{int(match[2]) * int(match[4]) + int(match[3])}", match[4]))
    if match := _RATIO.fullmatch(text):
        return _signed(match[1] or "", _quotient(match[2] or match[4], match[3] or match[5]))
    return None


def is_improper(text: str) -> bool:
    """True for a mixed number that is none: `4 10/3`, `2 3/3`, `0 1/2`."""
    match = _MIXED.fullmatch(text)
    return match is not None and not (int(match[2]) > 0 and 0 < int(match[3]) < int(match[4]))


def compare(answer: str, gold: str) -> bool | None:
    """True where two number literals are equal; None if either is not one.

    Exact, with one tolerance: a decimal may round a fraction (0.333333 for 1/3), to `close`.
    """
    answer_decimal, gold_decimal = decimal(answer), decimal(gold)
    if answer_decimal is not None and gold_decimal is not None:
        return answer_decimal == gold_decimal
    a, g = rational(answer), rational(gold)
    if a is None or g is None:
        return None
    return a == g or (_has_digits_only(answer) != _has_digits_only(gold) and close(a, g))


def _has_digits_only(text: str) -> bool:
    """A decimal, scientific notation included: it may be the rounding of a fraction, but of no other decimal."""
    return decimal(text) is not None or _SCIENTIFIC.fullmatch(text) is not None


def close(a: Fraction | float, b: Fraction | float) -> bool:
    """Equal to six decimals, as math-verify rounds, *and* to 1e-4 of their size: tiny numbers are not all zero."""
    difference = abs(a - b)
    return difference <= 1e-6 and difference <= 1e-4 * min(abs(a), abs(b))


def _quotient(above: str, below: str) -> Fraction | None:
    denominator = int(below.replace(" ", ""))
    return Fraction(int(above.replace(" ", "")), denominator) if denominator else None


def _signed(sign: str, value: Fraction | None) -> Fraction | None:
    return -value if sign == "-" and value is not None else value


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction | None:
    head = int(whole + fixed)
    tail = Fraction(int(period), 10 ** len(period) - 1)
    return _signed(sign, (head + tail) / 10 ** len(fixed))
