r"""Extraction of a response's answer: the last balanced \boxed{...} after the last </think>."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_BOX = "\\boxed"
# An escaped character (\{, \}, \\) never opens or closes a TeX group.
_SENTENCE = 200  # characters between two boxes of one sentence
_SENTENCE_END = re.compile(r"[.!?](?:[\s$*]|\\[)\]]|$)|\n\s*\n|[\u3002\uff01\uff1f]")
_CONCLUDES = re.compile(
    r"\b(?:no|not|wait|actually|rather|correct\w*|sorry|instead|mistake\w*|wrong|oops|hmm|so|thus|hence|therefore|then|"
    r"gives?|which|becomes?|simplif\w+|equals?|means|final\w*|namely|because|since|but)\b|=|\\(?:implies|Rightarrow|to)\b|[→⇒]",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(response: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` outside the thinking part, stripped; None where there is none.

    Reasoning does not count: with a `</think>` only the text after the last one is read, and a `<think>` that is
    never closed leaves no answer. Of nested boxes the innermost last one counts. Two boxes with different contents in
    one sentence (`\boxed{7} or \boxed{8}`) are no answer. One pass, linear in the length.
    """
    text = after_thinking(response)
    if text is None:
        return None
    start = text.find(_BOX)
    if start < 0:
        return None
    while start > 0 and text[start - 1] == "\\":  # keep `\\boxed` (a line break, then a word) what it is
        start -= 1
    return _last_box(text, start)


def after_thinking(response: str) -> str | None:
    """The conclusion: what follows the last `</think>`; None where a `<think>` is never closed."""
    opened, closed = response.rfind(_OPEN), response.rfind(_CLOSE)
    if opened > closed:
        return None
    return response if closed < 0 else response[closed + len(_CLOSE) :]


def _last_box(text: str, start: int) -> str | None:
    groups: list[tuple[int, int]] = []  # per open group: where it and its content start if it is a box, else -1, -1
    best = previous = (-1, -1, -1)  # start of the box, start and end of its content
    for token in _TOKEN.finditer(text, start):
        kind = token.group()
        if kind == "{":
            groups.append((-1, -1))
        elif kind.startswith(_BOX):
            groups.append((token.start(), token.end()))
        elif kind == "}" and groups:
            opened, content = groups.pop()
            if content > best[1]:
                previous, best = best, (opened, content, token.start())
    if best[1] < 0:
        return None
    answer = text[best[1] : best[2]].strip()
    is_only = previous[1] < 0 or text[previous[1] : previous[2]].strip() == answer
    return answer if is_only or not _joins(text[previous[2] + 1 : best[0]]) else None


def _joins(between: str) -> bool:
    """True where two boxes with this text between them are two candidates: one sentence, in which nothing takes the
    first back or follows from it."""
    return len(between) <= _SENTENCE and _SENTENCE_END.search(between) is None and _CONCLUDES.search(between) is None
