"""Option letters of multiple-choice problems, read from free text."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from vold.grading.extract import extract_answer

if TYPE_CHECKING:
    from vold.types import Rollout  # imports torch, which grading workers must not

_LETTER_ALONE = re.compile(r"\W*([A-Z])(?:[.:)*]\s.*|\W*)")
_NAMED_LETTER = re.compile(
    r"(?i:\banswer(?:\s+is)?\s*:?\s*(?:option\s+)?)[*(]*([A-Z])(?=\s*(?:[.,:;)*]|$))", re.MULTILINE
)


def judged_text(rollout: Rollout) -> str:
    r"""The text that is graded: the response, or `\boxed{letter}` where it chooses an option without boxing its letter.

    A box may hold the option's text instead. Without a box, the letter after the last "answer" counts ("Answer: B",
    "the answer is (B)"), or a response that is no more than "B. 12".
    """
    choices, text = rollout.prompt.choices, rollout.text
    letters, boxed = string.ascii_uppercase[: len(choices)], extract_answer(text)
    if not choices or (boxed is not None and boxed in letters) or text.rfind("<think>") > text.rfind("</think>"):
        return text
    if boxed is not None:
        named = [letter for letter, choice in zip(letters, choices, strict=True) if boxed == choice.strip()]
    else:
        conclusion = text.rpartition("</think>")[2].strip()
        alone = _LETTER_ALONE.fullmatch(conclusion)
        named = [alone[1]] if alone else _NAMED_LETTER.findall(conclusion)[-1:]
    return f"\\boxed{{{named[0]}}}" if len(named) == 1 and named[0] in letters else text
