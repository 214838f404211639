"""Conversations by role, as OpenAI, ShareGPT, TRL, verl and ms-swift write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE = "<image>"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
}
UNTRAINED = ("weight", "loss", "train", "training", "loss_scale")  # OpenAI's, ms-swift's and axolotl's marks of a turn
TOOL_ROLES = {"tool", "function", "observation", "ipython"} | {
    f"{name}_{part}" for name in ("tool", "function") for part in ("call", "calls", "response", "result")
}


@dataclass(frozen=True)
class Turn:
    """One turn: system, user or assistant, its text with <image> marks, and whether it may be trained on."""

    role: str
    text: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the pictures that the turns themselves hold, in the order of their marks."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()

    def prompt(self) -> tuple[Turn, ...]:
        """The turns up to the last of the user: an answer that follows is left out. Raises ValueError where there is
        no such turn."""
        last = max((i for i, turn in enumerate(self.turns) if turn.role == "user"), default=-1)
        if last < 0:
            raise ValueError("no turn is the user's")
        if any(turn.role == "system" for turn in self.turns[last + 1 :]):
            raise ValueError("a system turn follows the last of the user")
        return self.turns[: last + 1]

    def targets(self, which: str) -> list[tuple[tuple[Turn, ...], str]]:
        """(turns before it, text) of the assistant turns to train on: the last turn, or all. Raises ValueError where
        the conversation does not end with the assistant."""
        if self.turns[-1].role != "assistant":
            raise ValueError(f"it ends with a turn of the {self.turns[-1].role}: a prompt, nothing to train on")
        ends = [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.trained]
        if which == "last":
            ends = [i for i in ends if i == len(self.turns) - 1]
        if not ends:
            raise ValueError("every assistant turn that would be trained on has weight 0")
        return [(self.turns[:end], self.turns[end].text) for end in ends]


def read_conversation(cell: Any, system: str | None = None) -> Conversation:
    """A list of {"role", "content"} or {"from", "value"}, or its JSON text; content is text, or parts of text and
    images. An empty system turn stays one: templates leave out a default of their own for it. system: the text of a
    system turn that the row keeps in a column of its own. Raises ValueError that names the turn for what is not such a
    list, for tools and other roles, for turns in an impossible order, and for two system turns."""
    cell = turns_of_text(cell)
    if not isinstance(cell, Sequence) or isinstance(cell, str | bytes) or not cell:
        raise ValueError("the conversation is no list of turns, or empty")
    images: list[Any] = []
    turns = [_turn(turn, f"turn {number}", images) for number, turn in enumerate(cell, start=1)]
    if system and system.strip():
        if turns[0].role != "system":
            turns.insert(0, Turn("system", system))
        elif turns[0].text.strip() != system.strip():
            raise ValueError("a system turn and a column of another system text: keep one")
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise ValueError(f"turn {number} is a system turn; only the first can be")
    first = next((turn.role for turn in turns if turn.role != "system"), "")
    if first == "assistant":
        raise ValueError("its first turn is the assistant's: no question stands before it")
    return Conversation(tuple(turns), tuple(images))


def turns_of_text(cell: Any) -> Any:
    """The list of turns that a cell keeps as JSON text; any other cell as it is."""
    if isinstance(cell, str) and cell.lstrip().startswith("[") and cell.rstrip().endswith("]"):
        try:
            turns = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        named = is_conversation(turns) and any(name in turns[0] for name in ("role", "from"))
        return turns if named else cell
    return cell


def is_conversation(cell: Any) -> bool:
    """Whether a cell holds turns, not text."""
    return isinstance(cell, list) and bool(cell) and all(isinstance(turn, Mapping) for turn in cell)


def _turn(turn: Any, where: str, images: list) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {type(turn).__name__}, not an object with role and content")
    name = turn.get("role") or turn.get("from")
    if name is None:
        raise ValueError(f"{where} has no role; it has {', '.join(map(str, list(turn)[:8]))}")
    role = str(name).strip().lower()
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        what = f"is of role {role!r}" if role in TOOL_ROLES else "calls a tool"
        raise ValueError(f"{where} {what}: tools are not supported")
    if role not in ROLES:
        raise ValueError(f"{where} is of role {name!r}; one of {', '.join(sorted(ROLES))}")
    role = ROLES[role]
    before = len(images)
    if "content" not in turn and "value" not in turn:
        raise ValueError(f"{where} has no content; it has {', '.join(map(str, list(turn)[:8]))}")
    text = _text(turn.get("content", turn.get("value")), where, images)
    if role == "assistant":
        if len(images) > before:
            raise ValueError(f"{where}, the assistant's, holds an image: only text can be trained on")
        if turn.get("prefix"):
            raise ValueError(f"{where} is the beginning of an answer ('prefix'): no whole one to train on")
    if not text.strip():
        if role == "system":
            return Turn(role, "")
        raise ValueError(f"{where}, of the {role}, is empty")
    if role != "assistant":
        return Turn(role, text)
    return Turn(role, _with_thought(turn, text, where), trained=_is_trained(turn, where))


def _is_trained(turn: Mapping, where: str) -> bool:
    """Whether no mark takes an assistant turn out of training. Raises ValueError for a weight between."""
    trained = True
    for name in UNTRAINED:
        value = turn.get(name)
        number = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}.get(str(value).lower(), value)
        if value is not None and number not in (0.0, 1.0):
            raise ValueError(f"{where} has {name} = {value!r}: a turn is trained on (1) or only read (0)")
        trained &= value is None or number == 1.0
    return trained


def _with_thought(turn: Mapping, text: str, where: str) -> str:
    """The text behind the thought that a column of its own holds, as Qwen3's template writes it; as it is where it
    holds the thought already."""
    thought = turn.get("reasoning_content") or turn.get("reasoning") or turn.get("thinking")
    if thought and not isinstance(thought, str):
        raise ValueError(f"the thought of {where} is {type(thought).__name__}, not text")
    if not thought or not thought.strip():
        return text
    if text.lstrip().startswith("<think>"):
        if thought.strip() not in text:
            raise ValueError(f"{where} has a thought in its text and another in a column of its own; keep one")
        return text
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + text.lstrip("\n")


def _text(content: Any, where: str, images: list) -> str:
    """The text of a turn's content; an image in it becomes a mark, and goes to `images`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of {where} is {type(content).__name__}, not text")
    return "".join(_part(part, where, images) for part in content)


def _part(part: Any, where: str, images: list) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of {where} is {type(part).__name__}, not text or an image")
    part = {name: value for name, value in part.items() if value is not None}  # Parquet fills in every key
    kind = part.get("type") or ("text" if "text" in part else "image" if "image" in part else "")
    if kind in ("text", "input_text", "output_text"):
        text = part.get("text", "")
        if not isinstance(text, str):
            raise ValueError(f"a part of {where} is {type(text).__name__}, not text")
        return text
    if kind in ("image", "image_url", "input_image"):
        held = part | (part["source"] if isinstance(part.get("source"), Mapping) else {})  # Anthropic's
        names = ("image", "image_url", "url", "path", "base64", "data")
        found = next((held[name] for name in names if name in held), None)
        images.append(found)  # None: the row's own images column has it
        return IMAGE
    raise ValueError(f"{where} holds a part of type {kind!r}: only text and images are supported")
