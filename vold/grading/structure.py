r"""The shape of an answer: a value, a named value, a list, set, pair or interval, a relation. No parser, linear passes.

math-verify reads `I=3` and `\cos 0=1` as booleans, the last side of any equation as its value, and lists in an order of
its own. Here an answer is taken apart by its top-level signs, and two answers are compared part by part; what remains
are pairs of single values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)
_OPENERS, _CLOSERS = frozenset({"{", "(", "[", "\\{", "\\begin"}), frozenset({"}", ")", "]", "\\}", "\\end"})
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=",
    r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", r"\leqq": "<=",
    r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\geqq": ">=",
    r"\approx": "~", r"\simeq": "~", r"\sim": "~", r"\thickapprox": "~", r"\in": "in",
}  # fmt: skip
for _sign in [
    "equiv",
    "cong",
    "notin",
    "subset",
    "subseteq",
    "supset",
    "supseteq",
    "propto",
    "mid",
    "nmid",
    "perp",
    "parallel",
    "to",
    "rightarrow",
    "mapsto",
    "leftarrow",
    "Rightarrow",
    "Leftarrow",
    "Leftrightarrow",
    "implies",
    "impliedby",
    "iff",
    "longrightarrow",
    "Longrightarrow",
    "models",
    "vdash",
    "gg",
    "ll",
    "prec",
]:
    _RELATIONS[f"\\{_sign}"] = _sign
FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
ORDERS = frozenset({"<", ">", "<=", ">="})
_WORD_JOINERS = {"or": "or", r"\lor": "or", r"\vee": "or", "and": "and", r"\land": "and", r"\wedge": "and"}
_CONJUNCTION = re.compile(r"(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
MAX_ITEMS = 64
MAX_DEPTH = 30

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau"
    r"|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell)(?![A-Za-z])"
)
_INDEX = r"(?:_\{[^{}]*\}|_[A-Za-z0-9])"
_SYMBOL = rf"(?:[A-Za-z]|{_GREEK}){_INDEX}?'*{_INDEX}?"
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_FUNCTION = rf"(?:[fghFGHPQRSTVACEuvpqrs]|{_GREEK}){_INDEX}?'*(?:\^\{{?-1\}}?)?'*"
_ARGUMENT = rf"(?:{_SYMBOL}|{_NUMBER})"
_POINTS = r"(?:[A-Z](?:_\{?[0-9]\}?|')?){1,4}"
_VECTOR = r"\\(?:vec|overrightarrow|hat|bar|overline|widehat|mathbf|mathcal)\{[A-Za-z]{1,3}\}"
NAME = re.compile(
    rf"{_SYMBOL}|{_FUNCTION}\({_ARGUMENT}(?:,{_ARGUMENT})*\)|{_POINTS}|m?\\(?:angle|triangle|arc)\s?{_POINTS}"
    rf"|{_VECTOR}|\|{_POINTS}\||\\?\|{_VECTOR}\\?\||\\frac\{{d[a-z]?\}}\{{d[a-z]\}}|\\Delta\s?{_SYMBOL}"
    rf"|[A-Za-z]_\\text\{{[A-Za-z ]*\}}|\\frac\{{{_POINTS}\}}\{{{_POINTS}\}}|{_POINTS}/{_POINTS}"
)
_NAME_WORDS = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "for",
        "and",
        "in",
        "to",
        "area",
        "perimeter",
        "circumference",
        "volume",
        "length",
        "width",
        "height",
        "depth",
        "radius",
        "diameter",
        "side",
        "base",
        "slope",
        "surface",
        "sum",
        "difference",
        "product",
        "quotient",
        "average",
        "mean",
        "median",
        "mode",
        "range",
        "probability",
        "total",
        "number",
        "count",
        "cost",
        "price",
        "profit",
        "revenue",
        "speed",
        "velocity",
        "distance",
        "time",
        "age",
        "ages",
        "answer",
        "result",
        "value",
        "values",
        "solution",
        "solutions",
        "root",
        "roots",
        "maximum",
        "minimum",
        "max",
        "min",
        "least",
        "greatest",
        "largest",
        "smallest",
        "final",
        "angle",
        "measure",
        "ratio",
        "expected",
        "amount",
        "money",
        "gcd",
        "lcm",
        "hcf",
        "degree",
        "degrees",
        "remainder",
        "equation",
        "function",
        "inverse",
        "vertex",
        "center",
        "centre",
        "focus",
        "domain",
        "range",
        "x",
        "y",
        "z",
        "n",
        "triangle",
        "square",
        "rectangle",
        "circle",
        "sphere",
        "cube",
        "cone",
        "cylinder",
        "all",
        "possible",
        "integer",
        "integers",
        "ways",
        "coordinates",
    ]
)


@dataclass(frozen=True)
class Value:
    """A single value, for the rules and the parser."""

    text: str


@dataclass(frozen=True)
class Listing:
    """kind: bare (`1, 2`), set, pair (round brackets) or interval (other brackets, or an infinite end).
    brackets: the two around it; joiner: what separates the items of a bare list: ",", "or" or "and"."""

    items: tuple[Shape, ...]
    kind: str
    brackets: str = ""
    joiner: str = ","


@dataclass(frozen=True)
class Relation:
    """Sides and the signs between them: an equation whose left side is no name, an inequality, a chain."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    r"""`x = 7`, `f(x) = 2x`, `\text{Area} = 12`, `x \in [1,2]`."""

    name: str
    value: Shape
    relation: Relation


Shape = Value | Listing | Relation | Named


def tight(text: str) -> str:
    """`text` without the spaces that separate nothing: those beside a sign, but not behind a comma."""
    return re.sub(r"(?<=[^A-Za-z0-9,\\\s])\s+|\s+(?=[^A-Za-z0-9\s])", "", text.strip())


def split(text: str, separators: dict[str, str]) -> tuple[list[str], list[str]]:
    """(parts, separators between them, by their canonical names) at the top level of brackets and environments."""
    parts, found, depth, start = [], [], 0, 0
    for token in _TOKEN.finditer(text):
        sign = token.group()
        if sign in _OPENERS:
            depth += 1
        elif sign in _CLOSERS:
            depth -= 1
        elif depth <= 0 and sign in separators and not _is_thousands_comma(text, token.start()):
            parts.append(text[start : token.start()].strip())
            found.append(separators[sign])
            start = token.end()
    return [*parts, text[start:].strip()], found


def _is_thousands_comma(text: str, at: int) -> bool:
    """`1,234` outside brackets is a number; `1, 234` is not."""
    return text[at] == "," and re.match(r",[0-9]{3}(?![0-9])", text[at:]) is not None and text[:at][-1:].isdigit()


def is_name(text: str) -> bool:
    r"""True for what an equation may define: `x`, `a_{1}`, `f(3)`, `AB`, `\angle ABC`, `\text{Area}`; `-x`, `x^2`,
    `2x`, `\sin x` and `not x` are no names."""
    text = tight(text)
    if NAME.fullmatch(text):
        return True
    words = re.findall("[A-Za-z]+", re.sub(r"\\text", " ", text))
    plain = re.fullmatch(r"(?:\\text\{[A-Za-z ]*\}|[A-Za-z]{3,}|[A-Z]{2,4}|\\triangle ?|[ ])+", text.strip())
    return plain is not None and all(w.lower() in _NAME_WORDS or re.fullmatch("[A-Z]{1,4}", w) for w in words)


def shape(text: str) -> Shape:
    """The shape of a normalised answer. What is nested too deep to be one is a relation without a sign: equal to
    nothing."""
    text = text.strip()
    if _depth(text) > MAX_DEPTH:
        return Relation((text,), ())
    builder = re.fullmatch(
        r"\\\{\s?([A-Za-z])(?:\s?\\in\s?(?:\\mathbb\{R\}|\\mathbb R|R))?\s?(?:\||\\mid(?![A-Za-z])|:)(.*)\\\}", text
    )
    if builder:
        return shape(builder[2])
    inner = _bracketed(text)
    if inner is not None:
        return inner
    parts, joiners = _list_parts(text)
    if len(parts) > 1:
        joiner = next((j for j in joiners if j != ","), ",")
        items = tuple(shape(part) for part in parts if part)
        return Listing(items, "bare", joiner=joiner) if len(items) <= MAX_ITEMS else Relation((text,), ())
    return _relation(text)


def _list_parts(text: str) -> tuple[list[str], list[str]]:
    marked = _CONJUNCTION.sub(lambda match: "\\lor " if match[1] == "or" else "\\land ", text)
    return split(marked, {",": ",", ";": ";", r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and"})


def _relation(text: str) -> Shape:
    sides, signs = split(text, _RELATIONS)
    if not signs:
        return _plus_or_minus(text)
    if signs == ["~"] and not sides[0]:
        return shape(sides[1])
    relation = Relation(tuple(sides), tuple(signs))
    if signs == ["in"] and not sides[0]:
        return _as_interval(shape(sides[1]))
    if signs == ["in"] and is_name(sides[0]):
        return Named(tight(sides[0]), _as_interval(shape(sides[1])), relation)
    if signs == ["=", "~"] and is_name(sides[0]):
        return Named(tight(sides[0]), Relation(relation.sides[1:], relation.signs[1:]), relation)
    if len(signs) == 1 and signs[0] in "=~" and all(sides):
        return _equation(sides[0], sides[1], signs[0])
    return relation


def _equation(left: str, right: str, sign: str) -> Shape:
    if not _names(left) and _names(right) and sign == "=":
        left, right = right, left
    names = _names(left)
    if not names or (_is_bare_name(right) and NAME.fullmatch(tight(left)) and "(" not in left):
        return Relation((left, right), (sign,))
    value = shape(right)
    if len(names) == 1:
        return Named(names[0], value, Relation((left, right), (sign,)))
    if isinstance(value, Listing) and value.kind == "pair" and len(value.items) == len(names):
        pairs = zip(names, value.items, strict=True)
        return Listing(tuple(Named(name, item, Relation((left, right), (sign,))) for name, item in pairs), "bare")
    return Relation((left, right), (sign,))


def _names(text: str) -> list[str]:
    """The names that an equation's side consists of: one, `(x,y)`, or the ratio `A:B`."""
    if is_name(text):
        return [tight(text)]
    inner = re.fullmatch(r"\((.*)\)", text.strip())
    parts = [part.strip() for part in inner[1].split(",")] if inner else []
    if len(parts) > 1 and all(NAME.fullmatch(part) for part in parts):
        return parts
    ratio = text.split(":")
    return [tight(text)] if len(ratio) > 1 and all(NAME.fullmatch(part.strip()) for part in ratio) else []


def _is_bare_name(text: str) -> bool:
    text = tight(text)
    return text not in ("e", "i") and "(" not in text and NAME.fullmatch(text) is not None


def _bracketed(text: str) -> Shape | None:
    """The shape of a text that stands in one pair of brackets as a whole; None where it does not."""
    for left, right in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("{", "}"), ("]", "[")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            inner = text[len(left) : -len(right)]
            if _closes_at_the_end(inner):
                return _group(inner.strip(), left, right)
    return None


def _group(inner: str, left: str, right: str) -> Shape | None:
    if left == "\\{":
        parts, _ = _split_inside(inner)
        return Listing(tuple(shape(part) for part in parts if part), "set") if parts != [""] else Value(r"\emptyset")
    if left == "{":
        parts, _ = _split_inside(inner)
        return Listing(tuple(map(shape, parts)), "set") if len(parts) > 1 else shape(inner)
    parts, _ = _split_inside(inner)
    if len(parts) == 1:
        return shape(inner) if left + right in ("()", "[]") and inner else None
    items = tuple(shape(part) for part in parts)
    infinite = any(isinstance(item, Value) and "\\infty" in item.text for item in items)
    is_pair = left + right == "()" and not infinite
    return Listing(items, "pair" if is_pair else "interval", left + right)


def _split_inside(inner: str) -> tuple[list[str], list[str]]:
    """Within brackets every comma separates."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(inner):
        sign = token.group()
        depth += (sign in _OPENERS) - (sign in _CLOSERS)
        if depth <= 0 and sign in ",;":
            parts.append(inner[start : token.start()].strip())
            start = token.end()
    return [*parts, inner[start:].strip()], []


def _closes_at_the_end(inner: str) -> bool:
    depth = 0
    for token in _TOKEN.finditer(inner):
        sign = token.group()
        depth += (sign in _OPENERS) - (sign in _CLOSERS)
        if depth < 0:
            return False
    return depth == 0


def _depth(text: str) -> int:
    depth = deepest = 0
    for sign in re.findall(r"\\[{}]|[][(){}]", text):
        depth += 1 if sign in _OPENERS else -1
        deepest = max(deepest, depth)
    return deepest


def _as_interval(value: Shape) -> Shape:
    if isinstance(value, Listing) and value.kind == "pair" and len(value.items) == 2:
        return Listing(value.items, "interval", value.brackets)
    return value


def _plus_or_minus(text: str) -> Shape:
    r"""`2 \pm x` is two values."""
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) != 1 or r"\mp" in text:
        return Value(text)
    values = [re.sub(r"\s*\\pm(?![A-Za-z])\s*", sign, text) for sign in "+-"]
    return Listing(tuple(Value(value.removeprefix("+").strip()) for value in values), "bare")
