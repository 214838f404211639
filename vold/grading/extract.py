r"""Extraction of a response's answer: the last balanced \boxed{...} after the last </think>."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_BOX = "\\boxed"
# An escaped character (\{, \}, \\) never opens or closes a TeX group.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(response: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` outside the thinking part, stripped; None where there is none.

    Reasoning does not count: with a `</think>` only the text after the last one is read, and a `<think>` that is
    never closed leaves no answer. Of nested boxes the innermost last one counts. One pass, linear in the length.
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
    groups: list[int] = []  # per open group: where its content starts if it is a box, else -1
    best = (-1, -1)
    for token in _TOKEN.finditer(text, start):
        kind = token.group()
        if kind == "{":
            groups.append(-1)
        elif kind.startswith(_BOX):
            groups.append(token.end())
        elif kind == "}" and groups:
            best = max(best, (groups.pop(), token.start()))
    return text[best[0] : best[1]].strip() if best[0] >= 0 else None
