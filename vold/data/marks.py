"""A row's turns, and where its pictures stand in them: `<image>` marks in order, or `<image 2>` by number, options
included."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vold.config.schema import DataConfig
from vold.data.conversations import IMAGE, Conversation, Turn, is_conversation, read_conversation, turns_of_text
from vold.data.layouts import Fields
from vold.data.pictures import picture_path

_NUMBERED = re.compile(r"<image[ _]?(\d+)>")
UNNAMED = "with an image that the text names nowhere: it is left out"


def problem_turns(fields: Fields) -> tuple[tuple[Turn, ...], list]:
    """A problem's turns, the question last, and the cells of its pictures."""
    turns = turns_of_text(fields.question) if fields.messages is None else fields.messages
    if fields.history:
        turns = [*_earlier(fields.history), {"role": "user", "content": _text(turns, "question")}]
    if fields.messages is not None or is_conversation(turns):
        conversation = read_conversation(turns, _system(fields))
        if fields.messages is None and conversation.turns[-1].role == "assistant":
            raise ValueError(
                "the prompt ends with the beginning of an answer, which is not continued here; leave it out"
            )
        return conversation.prompt(), _pictures(conversation, fields)
    question, system = Turn("user", _text(turns, "question")), _system(fields)
    return (Turn("system", system), question) if system else (question,), as_list(fields.images)


def trace_turns(fields: Fields) -> tuple[tuple[Turn, ...], list]:
    """A trace's turns, the answer last, and the cells of its pictures."""
    turns = fields.messages
    if turns is None:
        prompt, response = turns_of_text(fields.question), turns_of_text(fields.response)
        if not is_conversation(prompt):
            prompt = [{"role": "user", "content": _text(prompt, "prompt")}]
        if not is_conversation(response):
            response = [{"role": "assistant", "content": _text(response, "response")}]
        has_prompt = read_conversation(response[:1]).turns[0].role != "assistant" if len(response) > 1 else False
        turns = response if has_prompt else [*_earlier(fields.history), *prompt, *response]
    conversation = read_conversation(turns, _system(fields))
    return conversation.turns, _pictures(conversation, fields)


def _earlier(history: Any) -> list:
    """The turns of a column of earlier ones: (question, answer) pairs, or turns."""
    if isinstance(history, str):
        with suppress(ValueError, RecursionError):
            history = json.loads(history)
    if not history or is_conversation(history):
        return history or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"the history is no list of pairs of question and answer: {str(history)[:60]!r}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _pictures(conversation: Conversation, fields: Fields) -> list:
    """The pictures of a row: those that its turns hold, and for the others its column of images, in order."""
    column, in_turns = as_list(fields.images), conversation.images
    if column and in_turns and all(image is not None for image in in_turns):
        raise ValueError(f"its turns hold {len(in_turns)} images and its images column {len(column)} more; keep one")
    held = iter(column)
    cells = [next(held, None) if image is None else image for image in in_turns]
    if any(cell is None for cell in cells):
        raise ValueError(f"its turns mark {len(in_turns)} images and its images column holds {len(column)}")
    return [*cells, *held]


def as_list(cell: Any) -> list:
    """The pictures of a cell: of a list, of a list kept as text, or the only one. Empty ones in it are left out."""
    if isinstance(cell, str) and cell.strip().startswith("["):
        for read in (json.loads, literal_eval):  # neither runs anything
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                cell = read(cell)
                break
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    if isinstance(cell, Sequence) and not isinstance(cell, str | bytes | bytearray):
        return [item for item in cell if item is not None]
    return [cell]


@dataclass(frozen=True)
class Placed:
    """Turns and options with `<image>` marks, and the cell of each mark's picture, in order."""

    turns: tuple[Turn, ...]
    options: dict[str, str]
    pictures: tuple[Any, ...]


def place_images(turns: Sequence[Turn], options: Mapping[str, str], pictures: Sequence, notes: list[str]) -> Placed:
    """Give each mark its picture; pictures without any mark go in front of the first turn of the user. A note says
    where one is left out. Raises ValueError where marks and pictures differ in number, or a number names no picture."""
    asked = [index for index, turn in enumerate(turns) if turn.role != "assistant"]
    if pictures and any(IMAGE in turn.text for turn in turns if turn.role == "assistant"):
        raise ValueError(f"an {IMAGE} mark stands in a turn of the assistant: only text can be trained on")
    texts = [turns[index].text for index in asked] + list(options.values())
    numbers = [int(number) for text in texts for number in _NUMBERED.findall(text)]
    marks = sum(text.count(IMAGE) for text in texts)
    if numbers:
        if marks:
            raise ValueError(f"{IMAGE} marks and numbered ones (<image {numbers[0]}>) in one row; use one kind")
        if outside := [number for number in numbers if not 1 <= number <= len(pictures)]:
            raise ValueError(f"<image {outside[0]}> is named, and the row has {len(pictures)} images, counted from 1")
        if len(set(numbers)) < len(pictures):
            notes.append(UNNAMED)
        texts, pictures = [_NUMBERED.sub(IMAGE, text) for text in texts], [pictures[number - 1] for number in numbers]
    elif not marks and pictures:
        first = next(place for place, index in enumerate(asked) if turns[index].role == "user")
        texts[first] = IMAGE * len(pictures) + "\n" + texts[first]
    elif marks != len(pictures):
        raise ValueError(f"{marks} {IMAGE} marks but {len(pictures)} images")
    placed = dict(enumerate(turns))
    placed |= {index: replace(turns[index], text=text) for index, text in zip(asked, texts, strict=False)}
    return Placed(tuple(placed.values()), dict(zip(options, texts[len(asked) :], strict=True)), tuple(pictures))


def picture_paths(pictures: Sequence, config: DataConfig, folder: Path) -> tuple[Path, ...]:
    """The checked files of pictures (see `picture_path`)."""
    return tuple(picture_path(picture, config, folder) for picture in pictures)


def _system(fields: Fields) -> str | None:
    if fields.system is None or (isinstance(fields.system, str) and not fields.system.strip()):
        return None
    return _text(fields.system, "system turn")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or not text: {value!r}")
    return value
