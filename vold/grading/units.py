r"""A quantity is a value and a unit. Two units must be the same, under their aliases (`centimetres` is `cm`).

No conversion: 1 m is not 100 cm and 50% is not 0.5. math-verify drops units on both sides, which makes 5 cm equal 5 km.

A unit on one side only is dropped: the question has fixed it. In MATH-500 21 golds of 500 carry one (`145^\circ`,
`\$36`, `15\mbox{ cm}^2`), in GSM8K none of 1319: bare numbers of dollars, eggs or miles. So `5 cm` and `5`, `\$18` and
`18`, `7 apples` and `7` are equal. Only listed measures and nouns are dropped: any other word may scale, deny or date a
number (`7 lakh`, `7 fifths`, `7 wrong`, `7 pm`). Neither are letters that may be variables (`5m`, `2\mathrm{i}`), nor a
degree sign after a of pi.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ALIASES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gm", "kg": "kilogram", "lb": "pound lbs", "oz": "ounce", "t": "ton tonne",
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
_SCALES = frozenset({"percent", "am", "pm"})
_NOUNS_TEXT = """
acre adult animal answer apple app arrangement attempt baby badge bag bale ball balloon banana bandage barrel basket
batch bead beaker bean bear bed bee beetle bike bill bird biscuit block boat bolt bone book bottle bouquet bowl box boy
bracelet branch brick bridge brother brownie bubble bucket bug building bulb bus bush butterfly button cabinet cake call
calorie can candle candy car card carrot cat cd chair cheese cherry chicken child children chip chocolate choice
circle class classroom cloud coin color colour combination comic computer cookie copy couch court cow crate crayon cube
cup cupcake customer deer desk diagonal diaper dice die digit dish dog doll dolphin donut doughnut door dragon dress
drink drop duck dvd edge egg elephant element elf elves email employee engine error eye face factor factory family fan
farmer feather fence finger fish flight floor flower fly foot fork frame friend frog fruit game garden gem gift
girl glass glasses glove goal goat grade grape graph guest gun hair hand handshake hat head hen hexagon hole home horse
hotel house household insect instruction integer interval invoice item jar jewel job joke juice key kid kitten knife
knives ladder lady lamp lap lawn leaf leaves leg lemon lesson letter line lion lizard loaf loaves lollipop loop
machine magazine man marble mark match matches meal medal melon member men message metre movie mouse mice mug muffin
multiple nail napkin necklace nickel notebook novel number nut octagon onion option orange order ornament outcome
outfit ounce owl pack package packet page painting pancake panel paper parent part passenger path patient
peach peanut pear pen pencil penguin penny pennies pentagon people person persons pet petal phone photo piece pie pig
pill pillow pineapple pizza plane plant plate player plum pod poem point polygon pony popsicle post potato potatoes
present prize problem puppy puzzle question rabbit raspberry rat recipe rectangle report representative ring road
rock roll room rope rose row ruler runner sandwich sausage scoop screw seashell seat sequence serving set shape
sheep sheet shelf shelves shell ship shirt shoe shop shrimp side sister slice snack soap sock soldier solution
song sphere spider spoon stamp star state station stick sticker stitch stone store story street student subset
sunflower surfer sweater sweet table tablespoon tablet task teacher teammate team teaspoon term test ticket tie tile
tin tomato tomatoes tool tooth teeth toy track train tray tree triangle tricycle trip truck tube turn
turtle unit value van vase vegetable vehicle vertex vertices video visitor vote voter wall watch way wheel whale window
woman women word worker wrench yogurt zebra zero zeroes zeros pint quart gallon
"""
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


_CJK = {
    "毫米": "mm", "厘米": "cm", "公分": "cm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "克": "g",
    "千克": "kg", "公斤": "kg", "吨": "t", "毫升": "ml", "升": "l", "公顷": "ha", "秒": "s", "分钟": "min",
    "小时": "h", "天": "day", "日": "day", "周": "week", "个月": "month", "年": "yr", "岁": "yr", "度": "degree",
    "元": "yuan", "円": "yen", "美元": "dollar", "欧元": "euro", "平方毫米": "mm^2", "平方厘米": "cm^2",
    "平方分米": "dm^2", "平方米": "m^2", "平方千米": "km^2", "立方毫米": "mm^3", "立方厘米": "cm^3",
    "立方分米": "dm^3", "立方米": "m^3", "千米/时": "km/h", "千米/小时": "km/h", "米/秒": "m/s", "メートル": "m",
    "センチ": "cm", "グラム": "g", "時間": "h", "分間": "min", "원": "won", "도": "degree", "미터": "m", "시간": "h",
}  # fmt: skip
# counters of one sign each: 7个
_COUNTERS = "个個人名位只隻本件条條张張种種辆輛棵支枝颗顆块塊朵匹头頭" + "座根把套箱盒袋瓶杯题道页間间枚回次개명권"
_CJK |= dict.fromkeys(_COUNTERS, "unit")
_CJK_SUFFIX = re.compile(
    r"(.*[0-9)}πa-z])\s?(?:\\text\{)?\s?([\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af/]+)\}?", re.DOTALL
)


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
    if quantity.unit == "degree" and "\\pi" in quantity.value:
        return False
    words = re.findall("[a-z]+", quantity.unit)
    if not _OMISSIBLE_FORM.fullmatch(quantity.unit) or words[-1] in _SCALES:
        return False
    return all(word in _OMISSIBLE for word in words) and (quantity.certain or len(words[-1]) > 2)


def _are_nouns(answer: Quantity, gold: Quantity) -> bool:
    return all(re.search("[a-z]{3}", side.unit) for side in (answer, gold))


def quantity(text: str) -> Quantity:
    """Split a normalised answer into value and canonical unit."""
    if not text.isascii() and (match := _CJK_SUFFIX.fullmatch(text)):
        return Quantity(match[1], _CJK[match[2]]) if match[2] in _CJK else Quantity(text)
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
    letter = re.fullmatch(r"\\text\{\s?([A-Za-z])\s?\}", unit)
    if letter and re.search(r"[0-9A-Za-z)}\]]\s?[-+]", value):  # behind a sum it is a variable
        return Quantity(value + letter[1])
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


_OMISSIBLE_FORM = re.compile(r"(?:[a-z]+|(?:mm|cm|dm|m|km|in|ft|yd|mi|unit)\^\{?[23]\}?)(?:/[a-z]+(?:\^\{?[23]\}?)?)*")
_OMISSIBLE = (
    set(_CANONICAL.values()) | {canonical(noun) for noun in _NOUNS_TEXT.split()} | {"won", "degreec", "degreef"}
) - (_SCALES)
