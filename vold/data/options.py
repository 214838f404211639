"""The options of a multiple-choice problem, and the letters that its answer names."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

LETTERS = string.ascii_uppercase
_PREFIX = re.compile(r"\s*[(\[]?\s*([A-Za-z])\s*[)\].:]\s*(.*)", re.DOTALL)
PRINTED_ARRAY = re.compile(r"""['"]\s+['"]""")
"""In a list that is kept as text: NumPy prints no commas, and Python would read its texts as one."""
_LETTER = re.compile(r"\W*(?:(?i:option|choice|answer)\W+)?([A-Za-z])\W*")
_NAMES = ("label", "letter", "key", "id"), ("text", "content", "value", "option", "answer")


def read_options(cell: Any) -> dict[str, str]:
    """Letter -> text, from a list of texts, a dict by letters, {"label": [...], "text": [...]}, a list of such
    records, or any of these as text. An empty option is left out and the others keep their letters. Raises ValueError
    where the cell is none of these."""
    if isinstance(cell, str):
        cell = _literal(cell)
    if isinstance(cell, Mapping):
        options = _from_mapping(cell)
    elif isinstance(cell, Sequence) and not isinstance(cell, str | bytes):
        options = _from_list(list(cell))
    else:
        raise ValueError(f"choices are no list of options: {_short(cell)}")
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} choices, and letters for {len(LETTERS)}; drop the row")
    return _without_prefixes({letter: text for letter, text in zip(LETTERS, options, strict=False) if text})


def as_tuple(options: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of options A, B, … up to the last one, "" where a letter has none."""
    last = max(map(LETTERS.index, options), default=-1)
    return tuple(options.get(letter, "") for letter in LETTERS[: last + 1])


def named_letter(answer: Any, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer names: by its letter (B, (B), "B. text"), by its text, or by its index
    from 0. Raises ValueError where it names none, or could be read as two."""
    text = answer.strip() if isinstance(answer, str) else str(answer)
    if isinstance(answer, float) and answer.is_integer():  # an integer column with empty cells
        text = str(int(answer))
    readings = {
        "the text": [letter for letter, option in options.items() if option.strip() == text],
        "the letter": [letter for letter in [_spelled_letter(text, options)] if letter],
        "the index (from 0)": [LETTERS[int(text)]] if text.isdecimal() and LETTERS[int(text) % 26] in options else [],
    }
    if text.isdecimal() and int(text) >= len(LETTERS):
        readings["the index (from 0)"] = []
    found = {letter for letters in readings.values() for letter in letters}
    if len(found) == 1:
        return found.pop()
    if not found:
        raise ValueError(f"answer {_short(answer)} is not one of the options {', '.join(options)}")
    ways = ", ".join(f"{way} of {letter}" for way, letters in readings.items() for letter in letters)
    raise ValueError(f"answer {_short(answer)} is ambiguous: {ways}; give the letter")


def _spelled_letter(text: str, options: Mapping[str, str]) -> str:
    if alone := _LETTER.fullmatch(text):
        return alone[1].upper() if alone[1].upper() in options else ""
    prefixed = _PREFIX.fullmatch(text)
    if prefixed and options.get(prefixed[1].upper(), "").strip() == prefixed[2].strip():
        return prefixed[1].upper()
    return ""


def _from_mapping(cell: Mapping) -> list[str]:
    labels, texts = (next((cell[name] for name in names if name in cell), None) for names in _NAMES)
    if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
        return _by_label(zip(labels, texts, strict=True))
    return _by_label(cell.items())


def _from_list(cell: list) -> list[str]:
    if cell and all(isinstance(item, Mapping) for item in cell):
        pairs = [[next((item[n] for n in names if item.get(n) is not None), None) for names in _NAMES] for item in cell]
        if any(label is None or text is None for label, text in pairs):
            raise ValueError(f"choices[0] has no label and text: {_short(cell[0])}")
        return _by_label(pairs)
    return [_text(item) for item in cell]


def _by_label(pairs) -> list[str]:
    """Texts in the order of the letters; labels 1, 2, … (or 0, 1, …) stand for A, B, …"""
    texts: dict[str, str] = {}
    for label, text in pairs:
        name = str(label).strip().strip("().[]: ").upper()
        if name in texts:
            raise ValueError(f"choices name {label!r} twice")
        texts[name] = _text(text)
    if all(name.isdecimal() for name in texts):
        first = 0 if "0" in texts else 1
        places = {name: int(name) - first for name in texts}
    elif all(len(name) == 1 and name in LETTERS for name in texts):
        places = {name: LETTERS.index(name) for name in texts}
    else:
        strange = next(name for name in texts if not (len(name) == 1 and name in LETTERS))
        raise ValueError(f"choices are not named by letters: {_short(strange)}")
    options = [""] * (max(places.values(), default=-1) + 1)
    if len(options) > 10 * len(LETTERS):
        raise ValueError(f"choices are numbered up to {len(options)}")
    for name, text in texts.items():
        options[places[name]] = text
    return options


def _text(option: Any) -> str:
    if option is None:
        return ""
    if not isinstance(option, str | int | float):
        raise ValueError(f"an option is not text: {_short(option)}")
    return str(option).strip()


def _without_prefixes(options: dict[str, str]) -> dict[str, str]:
    """Options that already begin with their letter ("A. 4"), without it."""
    matches = {letter: _PREFIX.fullmatch(text) for letter, text in options.items()}
    if options and all(match and match[1].upper() == letter and match[2] for letter, match in matches.items()):
        return {letter: match[2] for letter, match in matches.items() if match}
    return options


def _literal(cell: str) -> Any:
    """A list or dict that is kept as its Python or JSON text, as MMMU has it."""
    if PRINTED_ARRAY.search(cell):
        raise ValueError(f"choices are a printed array without commas: {_short(cell)}; keep a list")
    if cell.strip().startswith(("[", "{")):
        for read in (json.loads, ast.literal_eval):  # neither runs anything
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return read(cell.strip())
    raise ValueError(f"choices are one text, not a list of options: {_short(cell)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
