r"""Gold answers of a data set: found in their cell, and refused where no grader could match them."""

from __future__ import annotations

import ast
import math
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

from vold.config.schema import DataConfig
from vold.data.options import PRINTED_ARRAY
from vold.grading import extract_answer, validate_gold

MAX_WORDS = 12
"""A gold of more words than this is prose: a response would have to repeat it to the letter."""
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SENTENCE_END = re.compile(r"[a-z]{2,}[.!?]\s+[A-Z]|[a-z]{3,}\.$")
_BOX = re.compile(r"\\boxed\s*\{")
_ONLY_BOX = re.compile(r"\$*\s*\\boxed\s*\{((?:(?!\\boxed).)*)\}\s*\.?\s*\$*", re.DOTALL)
_OTHER_BOX = re.compile(r"\\(?:fbox|boxed)(?:\s*(?=\{)|\s+([^\s{}$\\]+))")
_HTML = re.compile(
    r"</?(?:a|b|i|u|p|br|em|strong|su[bp]|div|span|t[adhr]|table|li|[ou]l|h[1-6]|font|m(?:ath|[inor]|frac|sup|sub))\b[^<>]*>"
    r"|&(?:[a-zA-Z]{2,8}|#\d+);"
)
_QUOTED = re.compile(r"\"[^\"]+\"|\u201c[^\u201c\u201d]+\u201d|'[^']+'")
_BLOCK = re.compile(r"\\begin\{")
_PLACEHOLDER = re.compile(
    r"(?:please )?(?:see|refer to|as shown in|shown in)(?: the)? (?:\w+ )?"
    r"(?:figure|image|picture|graph|diagram|solution|explanation|proof|above|below|text|attachment|table)s?\b.*"
    r"|(?:answers? (?:may|will) vary|proof(?: omitted)?|n/a|nan|null|tbd|todo|unknown|no answer|\?+|-+|\.+)\.?",
    re.IGNORECASE,
)


def answers_in(cell: Any) -> list:
    """The right answers of a cell: of a list, of a list of texts that is kept as text (`['4', 'four']`), or the only
    one."""
    if isinstance(cell, str) and cell.strip().startswith(("['", '["')) and not PRINTED_ARRAY.search(cell):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            listed = ast.literal_eval(cell.strip())  # runs nothing
            if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
                return listed
    return cell if isinstance(cell, list) else [cell]


def read_gold(cell: Any, config: DataConfig, default_form: str = "cell") -> str:
    """The gold answer in a cell, as `data.answer_in` says. Raises ValueError where there is none that a response could
    match, and names the setting that would find it."""
    form = config.answer_in or default_form
    text = _OTHER_BOX.sub(lambda box: f"\\boxed{{{box[1]}}}" if box[1] else "\\boxed", _as_text(cell))
    gold = FORMS[form](text)
    if config.answer_in is None and form == "cell":
        _check_whole(gold)
    check_gold(gold)
    return gold


def check_gold(gold: str) -> None:
    """Raise ValueError for a gold answer that no response could match: prose, several lines, a placeholder."""
    validate_gold(gold)
    if _PLACEHOLDER.fullmatch(gold.strip()):
        raise ValueError(f"gold answer {_short(gold)} is a placeholder, not an answer; drop the row")
    if found := _HTML.search(gold):
        raise ValueError(
            f"gold answer {_short(gold)} holds HTML ({found[0]}), which no response would; write it plainly"
        )
    if _QUOTED.fullmatch(gold.strip()):
        raise ValueError(f"gold answer {_short(gold)} is in quotation marks, in which no response would put it")
    if gold.lstrip().startswith("="):
        raise ValueError(f"gold answer {_short(gold)} begins with '='; keep what is behind it")
    if "\n" in gold.strip() and not _BLOCK.search(gold):
        raise ValueError(f"gold answer {_short(gold)} has several lines; keep only the final answer")
    words = _WORD.findall(re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r" \1 ", gold))
    if len(words) > MAX_WORDS or (len(words) > 4 and _SENTENCE_END.search(gold.strip())):
        raise ValueError(
            f"gold answer {_short(gold)} is prose of {len(words)} words, which no response would repeat to the letter; "
            "keep only the final answer"
        )


def _check_whole(text: str) -> None:
    """Name the setting where a cell holds more than the answer."""
    if "####" in text:
        raise ValueError(
            f"gold answer {_short(text)} holds a solution with its answer behind '####': set data.layout=gsm8k, or "
            "data.answer_in=hashes"
        )
    if _TAG.search(text):
        raise ValueError(f"gold answer {_short(text)} is between <answer> tags: set data.answer_in=answer_tag")
    if _BOX.search(text):
        raise ValueError(f"gold answer {_short(text)} is a solution with its answer in a box: set data.answer_in=boxed")


def _as_text(cell: Any) -> str:
    if isinstance(cell, bool):
        raise ValueError(f"gold answer must be a string, got {cell!r}; write Yes or No, True or False, as it is meant")
    if isinstance(cell, float) and not math.isfinite(cell):
        raise ValueError(f"gold answer {cell} is no number; fill it in or drop the row")
    if isinstance(cell, int | float | Decimal):
        return str(cell)
    if cell is None:
        raise ValueError("the answer is empty; fill it in or drop the row")
    validate_gold(cell) if not isinstance(cell, str) else None  # refuses what is no text
    return cell


def _behind_hashes(text: str) -> str:
    _, mark, answer = text.rpartition("####")
    if not mark:
        raise ValueError("answer has no '####'")
    return answer.strip().replace(",", "")


def _in_box(text: str) -> str:
    answer = extract_answer(text)
    if answer is None:
        raise ValueError(f"answer has no \\boxed: {_short(text)}")
    return answer


def _box_or_cell(text: str) -> str:
    return extract_answer(text) or text


def _in_tag(text: str) -> str:
    answers = _TAG.findall(text)
    if not answers:
        raise ValueError(f"answer has no <answer> tag: {_short(text)}")
    return answers[-1].strip()


FORMS = {
    "cell": lambda text: match[1] if (match := _ONLY_BOX.fullmatch(text.strip())) else text,
    "hashes": _behind_hashes,
    "boxed": _in_box,
    "box_or_cell": _box_or_cell,
    "answer_tag": _in_tag,
}


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]} … {text[-17:]}")
