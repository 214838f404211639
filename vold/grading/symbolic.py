r"""math-verify as the parser and comparer of what the policy leaves open. Imported only where sympy may run."""

from __future__ import annotations

import logging
from functools import partial

from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import LatexExtractionConfig, parse, parser, verify
from sympy import Basic, FiniteSet, Interval, MatrixBase, Tuple

from vold.grading.literals import close

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


def symbolically_equal(answer: str, gold: str) -> tuple[bool, str]:
    """math-verify's verdict on two normalised answers; an answer or gold it cannot read is `unparsed` and wrong."""
    parsed_answer, parsed_gold = _parse(answer), _parse(gold)
    if not parsed_answer or not parsed_gold:
        return False, "unparsed"
    if not verify(parsed_gold, parsed_answer, allow_set_relation_comp=True, timeout_seconds=None):
        return False, "math-verify"
    return (True, "math-verify") if _same_size(parsed_answer[0], parsed_gold[0]) else (False, "tiny")


def _parse(text: str) -> list:
    """Always boxed: math-verify finds no unboxed `12\\sqrt{3}`."""
    return parse(
        rf"\boxed{{{text}}}",
        [_LATEX],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _same_size(answer: object, gold: object) -> bool:
    """False where math-verify took two different tiny numbers for equal, because both round to 0.000000."""
    ours, theirs = _values(answer), _values(gold)
    if len(ours) != len(theirs):
        return True
    return all(abs(b) >= 1e-3 or a == b or close(a, b) for a, b in zip(ours, theirs, strict=True))


def _values(expr: object) -> list[float]:
    """The real numbers among the elements of an answer; of a set, which has no order, sorted."""
    if isinstance(expr, FiniteSet):
        return sorted(value for element in expr.args for value in _values(element))
    if isinstance(expr, Interval):
        return _values(expr.start) + _values(expr.end)
    if isinstance(expr, Tuple | MatrixBase):
        return [value for element in expr for value in _values(element)]
    if isinstance(expr, Basic) and expr.is_number and expr.is_extended_real:
        return [float(expr.evalf(20))]
    return []
