r"""Algebra on what the policy leaves open: math-verify's parser, and a comparison of our own. Only where sympy may run.

math-verify's comparison rounds to zero, compares booleans and solves equations for the wrong name; here two values are
equal where their difference is zero, exactly or to `_DIGITS` digits at several points.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache, partial

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import LatexExtractionConfig, parse, parser
from sympy import Basic, Expr, Float, I, MatrixBase, Rational, Symbol

from vold.grading.compare import compare
from vold.grading.literals import close, decimal
from vold.grading.scalars import scalar_rules
from vold.grading.structure import FLIPPED, ORDERS, Listing, Named, Relation, Shape, Value, shape, split, tight

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off; the pool has its own

# latex2sympy takes R for r unless told otherwise, and math-verify has no way to tell it.
parser.latex2sympy = partial(parser.latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))

# units=False: they were compared before; math-verify would also strip variables (`5m`, `2t`) as if they were units.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)
_DIGITS = 50
_TINY = Rational(1, 10**20)
_POINTS = (Rational(137, 71), Rational(-53, 29), Rational(211, 307), Rational(-19, 101), Rational(61, 17))
_COMMANDS = frozenset(
    [
        "frac",
        "sqrt",
        "cdot",
        "times",
        "div",
        "pi",
        "infty",
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "Upsilon",
        "ell",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "arcsec",
        "arccsc",
        "arccot",
        "coth",
        "ln",
        "log",
        "exp",
        "lfloor",
        "rfloor",
        "lceil",
        "rceil",
        "binom",
        "sum",
        "prod",
        "int",
        "lim",
        "to",
        "max",
        "min",
        "gcd",
        "operatorname",
        "lvert",
        "rvert",
        "vert",
        "mathbb",
        "setminus",
        "cup",
        "cap",
        "emptyset",
        "begin",
        "end",
        "over",
        "overline",
        "vec",
        "hat",
        "bar",
        "sqrt",
        "text",
        "deg",
        "det",
        "ast",
        "left",
        "right",
        "dbinom",
        "tbinom",
        "overrightarrow",
        "mathbf",
        "mathcal",
        "langle",
        "rangle",
        "in",
        "circ",
        "nonumber",
        "not",
        "lbrack",
        "rbrack",
        "prime",
        "infty",
        "partial",
        "Re",
        "Im",
        "arg",
        "mathrm",
        "lVert",
        "rVert",
        "Vert",
    ]
)
# what the parser would drop, add up or divide by: 3 4, x', abcd, A^T, 12_x, 1/2x
_MISREAD = re.compile(
    r"(?<![_^])[0-9] [0-9]|'|\?|[A-Za-z]{4}|\^\{?T\}?|\"|#|@|&&|!\s?!|[A-Za-z]\s?\^\{\s?-1\}\(|[0-9)\]}]\s?_"
    r"|/\s?[0-9.]+\s?[A-Za-z(]|/\s?[A-Za-z]\s?[A-Za-z(]"
)
_MIXED = re.compile(r"(?<![0-9.}])([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_CONSTANT = re.compile(
    r"\\[A-Za-z]+|I(?:_\{([^{}]*)\}|_([A-Za-z0-9]))?|(?<![A-Za-z])[ie](?:_\{([^{}]*)\}|_([A-Za-z0-9]))"
)


class Unreadable(ValueError):
    """A text that is no mathematical expression to the parser, or one that it would misread."""


def symbolically_equal(answer: str, gold: str) -> tuple[bool, str]:
    """The verdict on two normalised answers; an answer or gold that cannot be read is `unparsed` and wrong."""
    leaf = _Algebra()
    verdict = compare(shape(answer), shape(gold), leaf)
    return (bool(verdict), "algebra" if verdict or not leaf.unread else "unparsed")


class _Algebra:
    """The leaf that decides everything; `unread` counts the texts that could not be parsed."""

    def __init__(self) -> None:
        self.unread = 0

    def scalar(self, answer: str, gold: str) -> bool:
        decision, answer, gold = scalar_rules(answer, gold)
        if decision is not None:
            return decision[0]
        try:
            return _same(_parse(answer), _parse(gold))
        except Unreadable:
            self.unread += 1
            return False

    def relation(self, answer: Relation, gold: Relation) -> bool:
        if answer.signs == gold.signs and [*map(tight, answer.sides)] == [*map(tight, gold.sides)]:
            return True
        if len(answer.sides) != 2 or len(gold.sides) != 2:
            return False
        ours, theirs = answer.signs[0], gold.signs[0]
        if not {ours, theirs} <= FLIPPED.keys():
            return False
        try:
            ratio = _ratio(_difference(answer), _difference(gold))
        except Unreadable:
            self.unread += 1
            return False
        if ratio is None or (ours in ORDERS and not ratio.is_real):
            return False
        return (ours if ratio.is_positive or ours not in ORDERS else FLIPPED[ours]) == theirs

    def region(self, answer: Shape, gold: Shape) -> bool:
        if isinstance(answer, Relation) and isinstance(gold, Relation) and self.relation(answer, gold):
            return True
        try:
            ours, theirs = _region(answer), _region(gold)
        except Unreadable:
            self.unread += 1
            return False
        except (NotImplementedError, TypeError, AttributeError):
            return False
        names = [_variables(part) for part in (answer, gold)]
        if all(names) and names[0] != names[1]:
            return False
        return _same_set(ours, theirs)

    def rounds(self, exact: str, rounded: str) -> bool:
        digits = decimal(rounded)
        if digits is None:
            return False
        try:
            value = _parse(exact)
        except Unreadable:
            return False
        unit = Rational(10) ** -len(digits.partition(".")[2])
        if not isinstance(value, Expr) or not value.is_number or not value.is_extended_real:
            return False
        return bool(abs(sympy.N(value, 30) - sympy.N(Rational(digits), 30)) <= unit / 2 * Rational(1000001, 1000000))


@lru_cache(maxsize=256)
def _parse(text: str) -> Basic | MatrixBase:
    """The expression. Always boxed: math-verify finds no unboxed `12\\sqrt{3}`. Raises Unreadable."""
    found = parse(
        rf"\boxed{{{_readable(text)}}}",
        [_LATEX],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found or not isinstance(found[0], Basic | MatrixBase):
        raise Unreadable
    if isinstance(found[0], sympy.logic.boolalg.Boolean) and not isinstance(found[0], Symbol):
        raise Unreadable
    return _plain(found[0], text)


def _readable(text: str) -> str:
    """`text` where the parser reads it as it is meant. Raises Unreadable where it would drop or invent something."""
    commands = re.findall(r"\\([A-Za-z]+)", text)
    if not _COMMANDS.issuperset(commands) or not text.isascii():
        raise Unreadable
    letters = re.sub(r"\\(?:begin|end)\{[a-z]*\}|\\text\{[^{}]*\}|\\operatorname\{[a-z]*\}|\\[A-Za-z]+", r"\\", text)
    if _MISREAD.search(letters):
        raise Unreadable
    text = _CONSTANT.sub(_protected, text)
    return _MIXED.sub(_sum, text)


def _protected(match: re.Match[str]) -> str:
    """I, e_1 and i_n are names; the parser makes them the imaginary unit and Euler's number."""
    if match[0].startswith("\\"):
        return match[0]
    index = next((group for group in match.groups() if group is not None), "")
    return rf"\Upsilon_{{{match[0][0]}{re.sub('[^A-Za-z0-9]', 'z', index)}}}"


def _sum(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    if not 0 < int(above) < int(below) or int(whole) == 0:
        raise Unreadable
    return rf"({whole}+\frac{{{above}}}{{{below}}})"


def _plain(found: Basic | MatrixBase, text: str) -> Basic | MatrixBase:
    """`found` with the imaginary unit for i, real odd roots and exact decimals where they are exact."""
    if isinstance(found, MatrixBase):
        return found.applyfunc(lambda entry: _plain(entry, text))
    found = found.replace(lambda part: isinstance(part, sympy.UnevaluatedExpr), lambda part: part.args[0])
    found = found.subs(Symbol("i"), I)
    if r"\sqrt[" in text:
        found = found.replace(_is_real_root, lambda part: -((-part.base) ** part.exp))
    found = found.doit()
    if found.has(sympy.nan, sympy.zoo, sympy.AccumBounds):
        raise Unreadable
    return found


def _is_real_root(part: Basic) -> bool:
    if not isinstance(part, sympy.Pow) or not part.exp.is_Rational or not part.base.is_number:
        return False
    return part.exp.p == 1 and part.exp.q % 2 == 1 and part.exp.q > 1 and bool(part.base.is_negative)


def _same(answer: Basic | MatrixBase, gold: Basic | MatrixBase) -> bool:
    if isinstance(answer, MatrixBase) or isinstance(gold, MatrixBase):
        both = isinstance(answer, MatrixBase) and isinstance(gold, MatrixBase)
        return both and answer.shape == gold.shape and all(map(_same, answer.flat(), gold.flat()))
    if isinstance(answer, sympy.Set) or isinstance(gold, sympy.Set):
        both = isinstance(answer, sympy.Set) and isinstance(gold, sympy.Set)
        return both and _same_set(answer, gold)
    if not isinstance(answer, Expr) or not isinstance(gold, Expr):
        return False
    if answer == gold:
        return True
    if answer.is_infinite or gold.is_infinite:
        return False
    if answer.has(Float) or gold.has(Float):
        if not answer.has(Float) or not gold.has(Float):
            return _rounded_same(answer, gold)
        answer, gold = _exact(answer), _exact(gold)
    return _is_zero(answer - gold, answer, gold)


def _rounded_same(answer: Expr, gold: Expr) -> bool:
    """A decimal coefficient may be exact (0.5 x), and a decimal number the rounding of an exact one."""
    if _is_zero(_exact(answer) - _exact(gold), answer, gold):
        return True
    if not (answer.is_number and gold.is_number):
        return False
    values = [complex(part.evalf(30)) for part in (answer, gold)]
    return all(abs(v.imag) < 1e-12 for v in values) and close(values[0].real, values[1].real)


def _exact(expr: Expr) -> Expr:
    return expr.replace(lambda part: isinstance(part, Float), lambda part: Rational(str(part)))


def _is_zero(difference: Expr, *sources: Expr) -> bool:
    """True where the difference of two expressions vanishes: exactly for numbers of fractions and powers, else to
    `_DIGITS` digits at every point where it is defined. An expression with huge numbers must simplify to zero."""
    if difference.is_Rational:
        return difference == 0
    symbols = sorted(difference.free_symbols, key=str)
    if difference.has(sympy.core.function.AppliedUndef):
        return sympy.simplify(difference) == 0
    defined, certain = 0, all(map(_is_tame, sources))
    for first in range(len(_POINTS) if symbols else 1):
        point = {symbol: _POINTS[(first + number) % len(_POINTS)] + number for number, symbol in enumerate(symbols)}
        values = [part.subs(point) for part in (difference, *sources)]
        if any(value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) for value in values):
            continue
        vanishes = _vanishes(*values)
        if vanishes is False:
            return False
        certain = certain and vanishes is True
        defined += 1
    return defined > 0 and (certain or sympy.simplify(difference) == 0)


def _vanishes(difference: Expr, *sources: Expr) -> bool | None:
    """False where the difference is a number other than 0; None where both sources are too small to tell."""
    if difference.is_Rational:
        return difference == 0
    try:
        numbers = [abs(part.evalf(_DIGITS, maxn=4 * _DIGITS)) for part in (difference, *sources)]
        size = max(numbers[1:])
        return None if size < _TINY else bool(numbers[0] < size * Rational(10) ** (10 - _DIGITS))
    except TypeError:
        return False


def _is_tame(expr: Expr) -> bool:
    """No integer of more than 12 digits and no exponent beyond 100: nothing that hides below the digits compared."""
    numbers = expr.atoms(Rational)
    if any(max(abs(number.p), number.q) > 10**12 for number in numbers):
        return False
    powers = (power.exp for power in expr.atoms(sympy.Pow) if power.exp.is_number)
    return all(abs(complex(power.evalf(5))) <= 100 for power in powers) and expr.count_ops() <= 400


def _difference(relation: Relation) -> Expr:
    left, right = (_parse(side) for side in relation.sides)
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        raise Unreadable
    return _exact(left - right)


def _ratio(answer: Expr, gold: Expr) -> Expr | None:
    """The constant by which two sides-differences are proportional, None where they are not or nothing varies."""
    symbols = sorted(gold.free_symbols, key=str)
    if not symbols or answer.free_symbols != gold.free_symbols:
        return None
    for shift in range(3):
        point = {symbol: _POINTS[(shift + number) % 5] + number for number, symbol in enumerate(symbols)}
        ours, theirs = answer.subs(point), gold.subs(point)
        ratio = sympy.nsimplify(ours / theirs, rational=True) if theirs != 0 else sympy.nan
        if ratio.is_Rational and ratio != 0:
            break
        ratio = sympy.simplify(ours / theirs) if theirs != 0 else sympy.nan
        if ratio.is_number and ratio.is_finite and ratio != 0:
            break
    else:
        return None
    return ratio if _is_zero(answer - ratio * gold, answer, gold) else None


def _region(part: Shape) -> sympy.Set:
    if isinstance(part, Relation):
        return _solutions(part)
    if isinstance(part, Listing) and part.kind == "bare":
        sets = [_region(item) for item in part.items]
        return sympy.Union(*sets) if part.joiner == "or" else sympy.Intersection(*sets)
    if isinstance(part, Listing) and part.kind in ("interval", "pair") and len(part.items) == 2:
        low, high = (_parse(item.text) if isinstance(item, Value) else None for item in part.items)
        if low is None or high is None:
            raise Unreadable
        return sympy.Interval(low, high, part.brackets[0] in "(]", part.brackets[1] in ")[")
    if isinstance(part, Listing) and part.kind == "set":
        return sympy.FiniteSet(*(_parse(item.text) for item in part.items if isinstance(item, Value)))
    if isinstance(part, Value):
        return _set_expression(part.text)
    raise Unreadable


def _set_expression(text: str) -> sympy.Set:
    for sign, combine in ((r"\cup", sympy.Union), (r"\cap", sympy.Intersection), (r"\setminus", sympy.Complement)):
        parts, _ = split(text, {sign: sign})
        if len(parts) > 1:
            sets = [_region(shape(part)) for part in parts]
            return combine(*sets) if combine is not sympy.Complement or len(sets) == 2 else _fail()
    found = _parse(text)
    return found if isinstance(found, sympy.Set) else _fail()


def _fail():
    raise Unreadable


def _solutions(relation: Relation) -> sympy.Set:
    """The real numbers for which a chain of inequalities in one variable holds."""
    classes = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}
    sides = [_parse(side) for side in relation.sides]
    symbols = set().union(*(side.free_symbols for side in sides))
    if len(symbols) != 1 or not all(isinstance(side, Expr) for side in sides):
        raise Unreadable
    real = Symbol("x", real=True)
    sides = [side.subs(symbols.copy().pop(), real) for side in sides]
    solved = [
        sympy.solveset(classes[sign](left, right), real, sympy.S.Reals)
        for left, sign, right in zip(sides, relation.signs, sides[1:], strict=False)
    ]
    return sympy.Intersection(*solved)


def _variables(part: Shape) -> set[str]:
    if isinstance(part, Relation):
        return set().union(*(map(str, _parse(side).free_symbols) for side in part.sides))
    if isinstance(part, Listing) and part.kind == "bare":
        return set().union(*map(_variables, part.items))
    return {part.name} if isinstance(part, Named) else set()


def _same_set(answer: sympy.Set, gold: sympy.Set) -> bool:
    if answer == gold:
        return True
    ours, theirs = _pieces(answer), _pieces(gold)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    return all(
        one[2:] == other[2:] and _same_end(one[0], other[0]) and _same_end(one[1], other[1])
        for one, other in zip(ours, theirs, strict=True)
    )


def _same_end(answer: Expr, gold: Expr) -> bool:
    return answer == gold if answer.is_infinite or gold.is_infinite else _same(answer, gold)


def _pieces(region: sympy.Set) -> list[tuple] | None:
    """(start, end, left open, right open) of a union of intervals and points, in order; None for another set."""
    parts = region.args if isinstance(region, sympy.Union) else (region,)
    pieces: list[tuple] = []
    for part in parts:
        if isinstance(part, sympy.FiniteSet):
            pieces += [(point, point, False, False) for point in part.args]
        elif part == sympy.S.Reals:
            pieces.append((-sympy.oo, sympy.oo, True, True))
        elif isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        else:
            return None
    try:
        return sorted(pieces, key=lambda piece: (float(piece[0]), float(piece[1])))
    except TypeError:
        return None
