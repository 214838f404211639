"""Problems and traces from the layouts of public data sets; every row is validated before a model is touched.

A layout is a pair: how the file is cut into rows, and a function row -> Problem or Trace. Adding a data set adds one
function to a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vold.config.schema import DataConfig
from vold.grading import validate_gold

MAX_IMAGE_PIXELS = 64_000_000


@dataclass(frozen=True)
class Problem:
    """A question before any template; `<image>` marks each image's place."""

    id: str
    question: str
    gold: str = ""
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TextTrace:
    """A question with somebody's answer, as text (public SFT sets; our own traces carry token ids instead)."""

    problem: Problem
    response: str


def load_problems(config: DataConfig, report: Callable[[str], None] = print) -> list[Problem]:
    """All problems of a file. A bad row stops with file and row named, or is reported and skipped (on_error: skip)."""
    if config.layout not in PROBLEM_LAYOUTS:
        raise ValueError(f"data.layout = {config.layout!r} holds no problems; one of {', '.join(PROBLEM_LAYOUTS)}")
    problems = list(_rows(config, PROBLEM_LAYOUTS[config.layout], report))
    if not problems:
        raise ValueError(f"{config.path} holds no usable problem")
    return problems


def load_text_traces(config: DataConfig, report: Callable[[str], None] = print) -> list[TextTrace]:
    """All (question, response) rows of a text SFT set, see load_problems."""
    traces = list(_rows(config, TRACE_LAYOUTS[config.layout], report))
    if not traces:
        raise ValueError(f"{config.path} holds no usable trace")
    return traces


def _rows(config: DataConfig, parse: Callable, report: Callable[[str], None]) -> Iterator:
    for number, row in enumerate(_read(config.path), start=1):
        if config.limit is not None and number > config.limit:
            return
        try:
            yield parse(row, f"{config.path.stem}:{number}", config)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            line = f"{config.path} row {number}: {_reason(error, config.layout)}"
            if config.on_error == "stop":
                raise ValueError(f"{line} (data.on_error=skip leaves such rows out)") from None
            report(f"skipped {line}")


def _reason(error: Exception, layout: str) -> str:
    return str(error) if type(error) is ValueError else f"not a row of layout {layout!r} ({error!r})"


def _read(path: Path) -> Iterator[dict | list]:
    """Rows of a .json list, a .jsonl file or a .parquet table."""
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        for group in parquet.ParquetFile(path).iter_batches():
            yield from group.to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (_json(line, f"{path} line {n}") for n, line in enumerate(lines, start=1) if line.strip())
    else:
        rows = _json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of rows, found {type(rows).__name__}")
        yield from rows


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


# -- layouts: problems ---------------------------------------------------------------------------------------------


def _orz(row: list, id: str, config: DataConfig) -> Problem:
    """orz-57k: [{"from": "human", "value": q}, {"from": "assistant", "ground_truth": {"value": answer}}]"""
    return _problem(id, row[0]["value"], row[1]["ground_truth"]["value"])


def _orz_eval(row: dict, id: str, config: DataConfig) -> Problem:
    """Open-Reasoner-Zero evaluation: {"prompt": [{"from", "value"}], "final_answer"}"""
    return _problem(id, row["prompt"][0]["value"], row["final_answer"])


def _gsm8k(row: dict, id: str, config: DataConfig) -> Problem:
    """GSM8K: {"question", "answer": "... #### n"}"""
    _, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("answer has no '####'")
    return _problem(id, row["question"], gold.strip().replace(",", ""))


def _geometry3k(row: dict, id: str, config: DataConfig) -> Problem:
    """Geometry3K: {"problem" with <image> marks, "answer", "images": [paths]}"""
    root = (config.image_root or config.path.parent).resolve()
    images = tuple(_image(root, name) for name in row["images"])
    if row["problem"].count("<image>") != len(images):
        raise ValueError(f"{row['problem'].count('<image>')} <image> marks but {len(images)} images")
    return _problem(id, row["problem"], row["answer"], images)


def _messages_problem(row: dict, id: str, config: DataConfig) -> Problem:
    """Mixture-of-Thoughts: the user turn of {"messages": [{role, content}]}; there is no gold answer."""
    return Problem(id, _text(row["messages"][0]["content"], "question"))


def _problem(id: str, question: str, gold, images: tuple[Path, ...] = ()) -> Problem:
    gold = str(gold) if isinstance(gold, int | float) else gold
    validate_gold(gold)
    return Problem(id, _text(question, "question"), gold, images)


def _text(value, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or not text: {value!r}")
    return value


def _image(root: Path, name: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"image {name!r} lies outside {root}")
    if not path.is_file():
        raise ValueError(f"image {path} does not exist")
    try:
        with Image.open(path) as image:
            width, height = image.size
            image.verify()
    except Exception as error:
        raise ValueError(f"image {path} cannot be decoded: {error}") from None
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"image {path} has {width}x{height} pixels, over {MAX_IMAGE_PIXELS}")
    return path


# -- layouts: traces -----------------------------------------------------------------------------------------------


def _messages_trace(row: dict, id: str, config: DataConfig) -> TextTrace:
    """Mixture-of-Thoughts: the assistant content opens with <think>."""
    user, assistant = row["messages"][-2:]
    return TextTrace(Problem(id, _text(user["content"], "question")), _text(assistant["content"], "response"))


def _prompt_response(row: dict, id: str, config: DataConfig) -> TextTrace:
    """{"prompt", "response"}"""
    return TextTrace(Problem(id, _text(row["prompt"], "prompt")), _text(row["response"], "response"))


PROBLEM_LAYOUTS: dict[str, Callable] = {
    "orz": _orz,
    "orz-eval": _orz_eval,
    "gsm8k": _gsm8k,
    "geometry3k": _geometry3k,
    "messages": _messages_problem,
}
TRACE_LAYOUTS: dict[str, Callable] = {"messages": _messages_trace, "prompt-response": _prompt_response}
