r"""One spelling per answer: full-width forms, Unicode mathematics and LaTeX decoration become plain LaTeX.

Only spelling changes here; nothing is dropped that could tell two answers apart (units, signs, brackets stay).
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789-+", strict=True))
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "∙": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "ø": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "∘": r"\circ ", "→": r"\to ",
        "⇒": r"\Rightarrow ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
        "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "、": ",", "。": ".", "∶": ":", "′": "'", "’": "'",
        "“": '"', "”": '"', "⟨": "(", "⟩": ")", "⁄": "/", "∕": "/", "…": r"\ldots ",
    }
)  # fmt: skip

UNIT_LETTERS = "mgshlLNJWVA"  # single upright letters that are units behind a number
_ROOT = re.compile(r"√\s?(?:([0-9]+(?:\.[0-9]+)?|[A-Za-z])|\(([^()]*)\))")

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}"),
        (r"(?<=[0-9])(?:,|\{,\})\\!\s*(?=[0-9]{3}(?![0-9]))", ","),  # 11,\! 111 is one number
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\(?:textcolor|color)\s*\{[A-Za-z]+\}", ""),
        (
            r"\\(?:(?:math|text)(?:rm|bf|it|sf|tt)|text(?:normal|sc|sl)|mbox|emph|underline|boldsymbol|bm)\s*\{",
            r"\\text{",
        ),
        (r"\{\\rm\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:mathrm|text)\s*\{\s*(?:\\[,; ]|~)+\s*([^{}]*)\}", r"\\text{\1}"),
        (r"\\text\{(pi|theta|alpha|beta)\}", r"\\\1 "),
        (r"\\(?:bf|it|rm|sf|tt)(?![A-Za-z])", ""),
        (r"\\text\s*\{\s*", r"\\text{"),
        (r"\\text\{\s*\}", " "),
        (r"\\text\{([^{}A-Za-z]*)\s*\}", r"\1"),
        (r"(?<![0-9}])(?<![0-9}] )\\text\{([A-Za-z])\s*\}", r"\1"),  # after a number it may be a unit: 5\text{ m}
        (rf"\\text\{{([^{UNIT_LETTERS}\W\d_])\s*\}}", r"\1"),  # but no unit is called i, x or k
        (r",?\s*\\text\{(and|or)\s*\}", r" \1 "),
        (r"(?:\{\})?\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])", r"^\\circ "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:lbrace|\{)\s*", r"\\{"),
        (r"\s*\\(?:rbrace|\})", r"\\}"),
        (r"(?<![A-Za-z])([ap])\.\s?m\.?(?![A-Za-z])", r"\1m"),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:[lc]dots|dots[cbmi]?)(?![A-Za-z])|\.{2,}", r"\\ldots "),
        (r"(?<=[0-9A-Za-z)}])\*\*(?=[0-9A-Za-z({\\-])", "^"),
        (r"\^\s?(-\s?[0-9]+)", r"^{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"(?:(?<=[A-Za-z})\]])|(?<=\s))!=|\\not\s?=|\\neq(?![A-Za-z])", r"\\ne "),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|ln|log|exp)(?=\s?[({\\0-9]| [a-z](?![a-z]))", r"\\\1"),
        (r"(?<![A-Za-z\\])sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"<=|≦", r"\\le "),
        (r">=|≧", r"\\ge "),
        (r"(?<![A-Za-z\\])[Ii]nfinity(?![A-Za-z])", r"\\infty"),
        (r"\s+", " "),
        (r"(?<!\\)%", r"\\%"),
        (r"(?<!\\)\$", r"\\$"),
    )
)
_PREAMBLE = re.compile(
    r"(\\text\{)?(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?![A-Za-z])(?: is)?\s?[:=]?\s?(?(1)\})"
    r"\s?[:=]?\s?(?=\S)",
    re.IGNORECASE,
)
_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("`", "`"),
    ("\\boxed{", "}"),
    ("\\text{", "}"),
)


@lru_cache(maxsize=1024)  # all responses to a prompt have one gold
def normalise(text: str) -> str:
    """The canonical spelling of an answer; two answers with the same spelling are the same answer."""
    text = _plain_unicode(text).strip()
    text = _unwrap(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _unwrap(re.sub(r"\\\$([^$]{1,200}?)\\\$", r" \1 ", text).strip())
    if match := _PREAMBLE.match(text):
        text = _unwrap(text[match.end() :])
    text = text.rstrip(" .,;")
    return re.sub(r"^(-?)([0-9]+) ([0-9]+)/([0-9]+)(?=$| ?[A-Za-z\\])", r"\1\2\\frac{\3}{\4}", text)


@lru_cache(maxsize=256)
def plain_spelling(text: str) -> str:
    """Running text in the spelling of answers, with a bar before words and for each delimiter of mathematics."""
    text = re.sub(r"(?<!\\)\$|\\[()\[\]]", " | ", _plain_unicode(text))
    text = re.sub(r"(?<=\s)(?=(?:[A-Za-z]{3,}|as|in|is|to|or|of|if|at|by)(?:[\s.,;:?!]|$))", "| ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _plain_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _scripts(_scripts(text, _RAISED, "^"), _LOWERED, "_")
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    for glyph, (above, below) in _VULGAR.items():
        text = text.replace(glyph, rf"\frac{{{above}}}{{{below}}}")
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width and direction marks
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _scripts(text: str, table: dict[str, str], mark: str) -> str:
    """`cm²` is cm^{2}: NFKC alone would make it cm2."""
    run = re.compile(f"[{''.join(table)}]+")
    return run.sub(lambda match: f"{mark}{{{''.join(table[c] for c in match.group())}}}", text)


def _unwrap(text: str) -> str:
    """Remove math delimiters, emphasis, a box or a text group around the whole answer."""
    for left, right in _WRAPPERS:
        while len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left.endswith("{") and not _one_group(inner):
                break
            if left == "\\(" and inner.endswith("\\"):
                break
            text = inner.replace("$", "").strip() if left == "$" else inner.strip()
    return text


def _one_group(inner: str) -> bool:
    """True where the braces around `inner` belong together."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", inner, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0
