r"""A quantity is a value and a unit. Two units must be the same, under their aliases (`centimetres` is `cm`).

No conversion: 1 m is not 100 cm and 50% is not 0.5. math-verify drops units on both sides, which makes 5 cm equal 5 km.

A unit on one side only is dropped: the question has fixed it. In MATH-500 21 golds of 500 carry one (`145^\circ`,
`\$36`, `15\mbox{ cm}^2`), in GSM8K none of 1319: bare numbers of dollars, eggs or miles. So `5 cm` and `5`, `\$18` and
`18`, `7 apples` and `7` are equal. What scales or dates a number is no such unit (percent, dozen, million, pm), nor are
letters that may be variables (`5m`), nor a degree sign after a multiple of pi.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ALIASES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gm", "kg": "kilogram kilo", "lb": "pound lbs", "oz": "ounce", "t": "ton tonne",
    "ml": "milliliter millilitre", "l": "liter litre", "gal": "gallon", "ha": "hectare", "acre": "",
    "ms": "millisecond", "s": "second sec", "min": "minute mins", "h": "hour hr hrs", "day": "", "week": "",
    "month": "", "yr": "year yrs", "hz": "hertz", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "pa": "pascal",
    "mi/h": "mph", "km/h": "kph kmph kmh", "rpm": "", "degree": "deg degrees", "rad": "radian",
    "percent": "pct percentage",
    "dollar": "usd", "cent": "", "euro": "eur", "sterling": "gbp", "yuan": "rmb cny", "rupee": "rs inr",
    "yen": "jpy", "unit": "", "am": "", "pm": "", "mol": "mole", "kj": "kilojoule", "kw": "kilowatt", "kwh": "",
}  # fmt: skip
_CANONICAL = {name: unit for unit, names in _ALIASES.items() for name in (unit, *names.split())}
_CURRENCY = {
    r"\$": "dollar",
    "€": "euro",
    "£": "sterling",
    "¥": "yen",
    "₹": "rupee",
    r"\pounds": "sterling",
}
_KEPT = frozenset({
    "percent", "percentile", "am", "pm", "ten", "hundred", "thousand", "million", "billion", "trillion", "dozen",
    "gross", "score", "pair", "couple", "half", "halve", "third", "quarter", "tenth", "hundredth", "thousandth",
    "double", "triple", "squared", "cubed", "factorial", "not", "mod", "modulo", "or", "and",
})  # fmt: skip
_PREFIX = re.compile(r"(-?)\s?(\\\$|€|£|¥|₹|\\pounds(?![A-Za-z]))\s?(.+)", re.DOTALL)
_SUFFIX = re.compile(r"(.+?)\s?(\\%|\\\$|€|£|¥|₹|\^\\circ(?:\s?(?:\\text\{)?[CF]\}?|\s?\\text\{[^{}]*\})?)", re.DOTALL)

_LONG = "|".join(sorted((name for name in _CANONICAL if len(name) > 2), key=len, reverse=True))
_SHORT = "|".join([name for name in _CANONICAL if len(name) == 2] + ["Hz", "Pa", "kW", "kJ", "mL", "AM", "PM"])
_MEASURE = rf"(?<![A-Za-z\\])(?:(?i:{_LONG})s?|{_SHORT})(?![A-Za-z])"
_NOUN = r"(?<= )[A-Za-z]{3,}"
_LETTER = r"(?<=[0-9} /])[A-Za-z](?![A-Za-z])"
_WORD = rf"(?>\\text\{{[^{{}}]*\}}|{_MEASURE}|{_NOUN}|{_LETTER})"
_POWER = r"(?: ?\^ ?(?:\{-?[0-9]\}|[0-9]))?"
_TAIL = re.compile(rf" ?({_WORD}{_POWER}(?: ?(?:/|\\cdot|\\times|\*|(?<= )) ?{_WORD}{_POWER})*)$")
_MAX_UNIT_CHARS = 80  # the tail is searched in a window: a megabyte of unit words costs no more than one unit
_CERTAIN = re.compile(rf"\\text|{_MEASURE}")
_OPERATOR = re.compile(r"(?:\\cdot|\\times|\\div|\\pm|[-+*/^_=(,])$")


@dataclass(frozen=True)
class Quantity:
    """`unit` is "" without one; `certain` is False where the letters may be variables (`5m`, `2 xyz`)."""

    value: str
    unit: str = ""
    certain: bool = True


def same_unit(answer: Quantity, gold: Quantity) -> bool | None:
    """True where the units agree; None where only algebra can tell: letters that may be variables, against none or
    against other such letters."""
    if bool(answer.unit) != bool(gold.unit):
        side = answer if answer.unit else gold
        return True if _may_be_omitted(side) else False if side.certain else None
    if answer.certain and gold.certain:
        return answer.unit == gold.unit
    if answer.unit == gold.unit:
        return True if answer.certain or gold.certain else None
    if answer.unit and gold.unit and (answer.certain or gold.certain or _are_nouns(answer, gold)):
        return False
    return None


def _may_be_omitted(quantity: Quantity) -> bool:
    """True for measures, currencies and single nouns, which the question names; see above for the exceptions."""
    if " " in quantity.unit or not _KEPT.isdisjoint(re.findall("[a-z]+", quantity.unit)):
        return False
    if quantity.unit == "degree" and "\\pi" in quantity.value:
        return False
    return quantity.certain or re.fullmatch("[a-z]{3,}", quantity.unit) is not None


def _are_nouns(answer: Quantity, gold: Quantity) -> bool:
    return all(re.search("[a-z]{3}", side.unit) for side in (answer, gold))


def quantity(text: str) -> Quantity:
    """Split a normalised answer into value and canonical unit."""
    match = _PREFIX.fullmatch(text)
    if match is None:
        return _suffixed(text)
    rest, currency = _suffixed(match[3]), _CURRENCY[match[2]]
    return Quantity(match[1] + rest.value, currency if rest.unit in ("", currency) else f"{currency} {rest.unit}")


def _suffixed(text: str) -> Quantity:
    if match := _SUFFIX.fullmatch(text):
        return Quantity(match[1], _mark(match[2]))
    tail = _TAIL.search(text, max(0, len(text) - _MAX_UNIT_CHARS))
    if tail is None:
        return Quantity(text)
    value, unit = text[: tail.start()].strip(), tail[1]
    if not value or _OPERATOR.search(value):
        return Quantity(text)
    if not unit.startswith("\\text") and re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value)):
        return Quantity(text)  # letters before bare letters: algebra, not a measure
    return Quantity(value, canonical(unit), certain=_CERTAIN.search(unit) is not None)


def canonical(unit: str) -> str:
    r"""`\text{square centimetres}`, `cm^{2}` and `cm ^2` -> `cm^2`; words that are no unit stay as they are."""
    words = re.sub(r"\\text|\\cdot|\\times|[{}*.,]", " ", unit.lower())
    words = re.sub(r"\bper\b", "/", words)
    words = re.sub(r"\b(?:sq|square) ([a-z]+)", r"\1^2", words)
    words = re.sub(r"\b(?:cu|cubic) ([a-z]+)", r"\1^3", words)
    words = re.sub(r"([a-z]+) squared\b", r"\1^2", words)
    words = re.sub(r"([a-z]+) cubed\b", r"\1^3", words)
    words = re.sub(r" ?([/^]) ?", r"\1", re.sub(r"\s+", " ", words)).strip()
    return re.sub(r"[a-z]+", lambda match: _name(match[0]), words)


def _name(word: str) -> str:
    singular = word[:-1] if word.endswith("s") and len(word) > 2 else word
    return _CANONICAL.get(word) or _CANONICAL.get(singular) or singular


def _mark(mark: str) -> str:
    if mark == r"\%":
        return "percent"
    if mark in _CURRENCY:
        return _CURRENCY[mark]
    scale = re.sub(r"\\text|\\circ|[^A-Za-z]", "", mark).lower()
    return f"degree{scale[:1]}"
