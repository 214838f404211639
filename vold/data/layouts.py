"""The row schemas of public data sets: which column each field is read from. A layout is a function from a row's cells
to its fields; `data.columns` gives a field another column in any of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vold.data.cells import Cells
from vold.data.options import LETTERS
from vold.data.pictures import decode_base64

IMAGE_COLUMNS = ("images", "image")
_OPTION = re.compile(r"[A-F]|(?:option|choice|opt|op)[ _-]?[a-f1-6]", re.IGNORECASE)  # names of an option's column
OTHER_MEDIA = ("videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Fields:
    """A row's cells, before they are checked; None where the row has none.

    question     text or turns; None where `messages` holds them
    answer       the right one, or a list of several
    choices      anything that `read_options` takes
    answer_form  where in its cell the answer is, unless data.answer_in says
    history      the turns before the question: (question, answer) pairs, or turns
    """

    question: Any
    answer: Any = None
    images: Any = None
    choices: Any = None
    category: Any = None
    system: Any = None
    response: Any = None
    answer_form: str = "cell"
    messages: Any = None
    history: Any = None


def _fields(cells: Cells, question: tuple[str, ...], answer: tuple[str, ...], **more: Any) -> Fields:
    """The fields that every layout has, from these columns; more: those that a layout reads in its own way."""
    read = {
        "images": lambda: cells.get("images", *IMAGE_COLUMNS),
        "choices": lambda: cells.get("choices"),
        "category": lambda: cells.get("category", "category"),
        "system": lambda: cells.get("system", "system"),
    }
    rest = {name: more[name] if name in more else get() for name, get in read.items()} | more
    return Fields(cells.need("question", *question), cells.get("answer", *answer), **rest)


def _orz(cells: Cells) -> Fields:
    """orz-57k: [{"from": "human", "value": q}, {"from": "assistant", "ground_truth": {"value": answer}}]"""
    return _fields(cells, ("0.value",), ("1.ground_truth.value",))


def _orz_eval(cells: Cells) -> Fields:
    """Open-Reasoner-Zero evaluation: {"prompt": [{"from", "value"}], "final_answer"}"""
    return _fields(cells, ("prompt.0.value",), ("final_answer",))


def _gsm8k(cells: Cells) -> Fields:
    """GSM8K: {"question", "answer": "... #### n"}"""
    return _fields(cells, ("question",), ("answer",), answer_form="hashes")


def _geometry3k(cells: Cells) -> Fields:
    """Geometry3K: {"problem" with <image> marks, "answer", "images": [paths, or {"bytes"} as in the hub's Parquet]}"""
    return _fields(cells, ("problem",), ("answer",))


def _virl39k(cells: Cells) -> Fields:
    r"""ViRL39K: {"question", "answer": "\boxed{...}", "image": [relative paths], "category"}"""
    return _fields(cells, ("question",), ("answer",), answer_form="box_or_cell")


def _vlaa(cells: Cells) -> Fields:
    """VLAA-Thinking: {"question", "gt" (or "answer"), "image": a relative path, "dataset"}"""
    return _fields(cells, ("question",), ("gt", "answer"), category=cells.get("category", "category", "dataset"))


def _vqa(cells: Cells) -> Fields:
    """Your own data: {"question", "answer", "image" or "images", "choices" or "options", "category" or "skill"};
    only the first two are required, or the first alone where nothing is graded."""
    return _fields(
        cells,
        ("question",),
        ("answer",),
        choices=cells.get("choices", "choices", "options"),
        category=cells.get("category", "category", "skill"),
    )


def _vlmevalkit(cells: Cells) -> Fields:
    """VLMEvalKit's TSV: index, question, [hint], [A, B, ...], answer, image (base64, a list of such, or the index of
    another row that holds it) or image_path, [category]. `<image 2>` marks the second image's position."""
    encoded = None if "images" in cells.mapped else cells.get("images", "image")
    images = cells.get("images", "image_path") if encoded is None else encoded
    if isinstance(images, str):
        images = re.findall(r"""['"]([^'"]+)['"]""", images) if images.lstrip().startswith("[") else [images]
    if encoded is not None:
        images = [decode_base64(image) for image in images]
    question = cells.get("question", "question")
    if question is None:  # the question is in the picture
        question = "Answer the question in the image." if images else cells.need("question", "question")
    if (hint := cells.get("hint", "hint")) is not None:
        question = f"Hint: {hint}\nQuestion: {question}"
    letters = {letter: text for letter in LETTERS if (text := cells.get("choices", letter)) is not None}
    choices = cells.get("choices") if "choices" in cells.mapped else letters or None
    answer, category = cells.get("answer", "answer"), cells.get("category", "category")
    return Fields(question, answer, images, choices, category, cells.get("system"))


def _mmmu(cells: Cells) -> Fields:
    """MMMU: {"question" and "options" with <image k> marks, "answer": a letter, "image_1" … "image_7", "subfield"}"""
    numbered = [cells.get("images", f"image_{number}") for number in range(1, 9)]
    images = cells.get("images") if "images" in cells.mapped else [image for image in numbered if image is not None]
    choices = cells.get("choices", "options", "choices")
    return _fields(
        cells,
        ("question",),
        ("answer",),
        images=images,
        choices=None if choices in ("[]", [], "") else choices,
        category=cells.get("category", "subfield", "subject", "category"),
    )


def _alpaca(cells: Cells) -> Fields:
    """Alpaca: {"instruction", "input" (one of the two may be empty), "output", "system", "history"}"""
    more, history = cells.get("input", "input"), cells.get("history", "history")
    fields = _fields(cells, ("instruction",), ("answer",), response=cells.get("response", "output"), history=history)
    if isinstance(more, str) and isinstance(fields.question, str):
        parts = [part for part in (fields.question, more) if part.strip() and part.strip() != "<noinput>"]
        return replace(fields, question="\n\n".join(parts))
    return fields


def _messages(cells: Cells) -> Fields:
    """{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}, [images], [system]; the answer to
    grade, if any, from a column `answer` or `solution`."""
    turns = cells.need("messages", "messages", "conversations", "conversation")
    images, system = cells.get("images", *IMAGE_COLUMNS), cells.get("system", "system")
    answer, category = cells.get("answer", "answer", "solution"), cells.get("category", "category")
    return Fields(None, answer, images, None, category, system, messages=turns)


def _prompt_response(cells: Cells) -> Fields:
    """{"prompt", "response"}: text, or turns as in `messages`; [images], [system], [history]"""
    field = "prompt" if "prompt" in cells.mapped else "question"
    prompt, response = cells.need(field, "prompt"), cells.need("response", "response")
    images, system = cells.get("images", *IMAGE_COLUMNS), cells.get("system", "system")
    history = cells.get("history", "history")
    return Fields(prompt, images=images, system=system, response=response, history=history)


def check_unread(cells: Cells, fields: Fields, notes: list[str]) -> None:
    """Raise ValueError for a row with columns that change what it means and that no layout reads; a note says where the
    row loses less."""
    row = cells.row if isinstance(cells.row, dict) else {}
    held = {name: cell for name, cell in row.items() if cell and name not in cells.read}
    if media := next((name for name in OTHER_MEDIA if name in held), None):
        raise ValueError(f"column {media!r} holds what the model would have to see: only text and images are supported")
    if fields.choices is None and len(options := [name for name in held if _OPTION.fullmatch(str(name))]) > 1:
        raise ValueError(
            f"columns {', '.join(map(repr, options[:8]))} look like options, and this layout does not read them: "
            "data.layout=vlmevalkit reads columns A, B, …; another file needs them as one list (data.columns.choices)"
        )
    answered = fields.response is not None or fields.messages is not None
    if answered and row.get("label") is False and "label" not in cells.read:  # KTO
        raise ValueError("column 'label' is false: an answer that is not to be learnt; leave such rows out")
    if any(name in held and str(held[name]).strip() not in ("[]", "null", "{}") for name in ("tools", "functions")):
        notes.append("with a column of tools, which the prompt does not show")


PROBLEM_LAYOUTS: dict[str, Callable[[Cells], Fields]] = {
    "orz": _orz,
    "orz-eval": _orz_eval,
    "gsm8k": _gsm8k,
    "geometry3k": _geometry3k,
    "virl39k": _virl39k,
    "vlaa": _vlaa,
    "vqa": _vqa,
    "vlmevalkit": _vlmevalkit,
    "mmmu": _mmmu,
    "alpaca": _alpaca,
    "messages": _messages,
}
TRACE_LAYOUTS: dict[str, Callable[[Cells], Fields]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt-response": _prompt_response,
}
