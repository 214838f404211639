"""Problems and text traces from the row schemas of public data sets; all rows are validated before a model is loaded.

The file's suffix chooses the reader of its rows (READERS), `data.layout` the function from a row to a Problem or a
TextTrace (PROBLEM_LAYOUTS, TRACE_LAYOUTS). A new data set is one function in a table.
"""

from __future__ import annotations

import csv
import json
import re
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from vold.config.schema import DataConfig
from vold.data.pictures import check_picture, decode_base64, store_picture
from vold.grading import extract_answer, validate_gold
from vold.io import log, one_line, one_line_errors
from vold.jsonl import bounded_lines
from vold.untrusted import JSON_BYTES, check_size

IMAGE = "<image>"
THREADS = 8


@dataclass(frozen=True)
class Problem:
    """A question before any template; `<image>` marks each image's position. `choices`: the texts of options A, B, …,
    where gold is a letter; `category`: the data set's name for the kind of problem."""

    id: str
    question: str
    gold: str = ""
    images: tuple[Path, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class TextTrace:
    """A question with a response as text (public SFT sets; `vold traces` keeps token ids instead)."""

    problem: Problem
    response: str


@one_line_errors()
def load_problems(config: DataConfig, report: Callable[[str], None] = log.info) -> list[Problem]:
    """All problems of a file, in order. Raises ValueError that names file and row for a bad row; with on_error: skip
    the row is left out and `report` gets that line."""
    if config.layout not in PROBLEM_LAYOUTS:
        raise ValueError(f"data.layout = {config.layout!r} holds no problems; one of {', '.join(PROBLEM_LAYOUTS)}")
    problems = list(_parse_rows(config, PROBLEM_LAYOUTS[config.layout], report))
    if not problems:
        raise ValueError(f"{config.path} holds no usable problem")
    return problems


@one_line_errors()
def load_text_traces(config: DataConfig, report: Callable[[str], None] = log.info) -> list[TextTrace]:
    """All (question, response) rows of a text SFT set; `report` and errors as in load_problems."""
    traces = list(_parse_rows(config, TRACE_LAYOUTS[config.layout], report))
    if not traces:
        raise ValueError(f"{config.path} holds no usable trace")
    return traces


def _parse_rows(config: DataConfig, parse: Callable, report: Callable[[str], None]) -> Iterator:
    """Problems or traces in order, parsed by several threads: decoding pictures is slow."""

    def attempt(numbered: tuple[int, dict | list | ValueError]):
        number, row = numbered
        if isinstance(row, ValueError):  # a line that could not be read
            return row
        try:
            return parse(row, f"{config.path.stem}:{number}", config)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return ValueError(f"{config.path} row {number}: {_reason(error, config.layout)}")

    rows = enumerate(islice(_read_rows(config.path), config.limit), start=1)
    with ThreadPoolExecutor(THREADS) as pool:
        while window := list(islice(rows, 16 * THREADS)):
            for result in pool.map(attempt, window):
                if not isinstance(result, ValueError):
                    yield result
                elif config.on_error == "stop":
                    raise ValueError(f"{result} (data.on_error=skip leaves such rows out)")
                else:
                    report(one_line(f"skipped {result}"))


def _reason(error: Exception, layout: str) -> str:
    if type(error) is ValueError:
        return str(error)
    reason = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
    return f"not a row of layout {layout!r} ({reason})"


def _read_rows(path: Path) -> Iterator[dict | list | ValueError]:
    """Rows of a .json list, a .jsonl file (an error in the place of a line that cannot be read), a .tsv table, a
    .parquet table, or all .parquet tables of a folder."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"data file {path} does not exist" + (" or holds no .parquet" if path.is_dir() else ""))
    for file in files:
        try:
            yield from READERS.get(file.suffix, _read_json)(file)
        except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _read_parquet(path: Path) -> Iterator[dict]:
    for group in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        yield from group.to_pylist()


def _read_jsonl(path: Path) -> Iterator:
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file), start=1):
            if line is None:
                yield ValueError(f"{path} line {number} is too long to be a row")
            elif line.strip():
                try:
                    yield _json(line, f"{path} line {number}")
                except ValueError as error:
                    yield error


def _read_json(path: Path) -> list:
    check_size(path, 8 * JSON_BYTES)
    rows = _json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, found {type(rows).__name__}")
    return rows


def _read_tsv(path: Path) -> Iterator[dict]:
    """Rows without their empty cells. An image may be given as the index of an earlier row that holds it."""
    csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    images: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            row = {name: cell for name, cell in row.items() if name and cell}
            if "image" in row and "index" in row:
                images[row["index"]] = row["image"] = images.get(row["image"], row["image"])
            yield row


def _json(text: str | bytes, where: str):
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, a thousand brackets
        raise ValueError(f"{where} is not JSON: {error}") from None


READERS: dict[str, Callable] = {".parquet": _read_parquet, ".tsv": _read_tsv, ".jsonl": _read_jsonl}


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
    """Geometry3K: {"problem" with <image> marks, "answer", "images": [paths, or {"bytes"} as in the hub's Parquet]}"""
    return _problem_with_images(id, row["problem"], row["answer"], _images(row["images"], config), row)


def _virl39k(row: dict, id: str, config: DataConfig) -> Problem:
    r"""ViRL39K: {"question", "answer": "\boxed{...}", "image": [relative paths], "category"}"""
    gold = extract_answer(row["answer"]) or row["answer"]
    return _problem_with_images(id, row["question"], gold, _images(row["image"], config), row)


def _vlaa(row: dict, id: str, config: DataConfig) -> Problem:
    """VLAA-Thinking: {"question", "gt" (or "answer"), "image": a relative path, "dataset"}"""
    gold = row["gt"] if "gt" in row else row["answer"]
    return _problem_with_images(
        id, row["question"], gold, _images([row["image"]], config), {"category": row.get("dataset"), **row}
    )


def _vqa(row: dict, id: str, config: DataConfig) -> Problem:
    """Your own data: {"question", "answer", "image" or "images": relative paths, "choices": [text of option A,
    of B, ...], "category" or "skill"}; only the first two are required."""
    images = row.get("images", row.get("image")) or []
    images = _images(images if isinstance(images, list) else [images], config)
    return _problem_with_images(id, row["question"], row["answer"], images, row, row.get("choices") or ())


def _vlmevalkit(row: dict, id: str, config: DataConfig) -> Problem:
    """VLMEvalKit's TSV: index, question, [hint], [A, B, ...], answer, image (base64, a list of such, or the index of an
    earlier row that holds it) or image_path, [category]. `<image 2>` marks the second image's position."""
    cell = row["image"] if "image" in row else row["image_path"]
    cells = re.findall(r"""['"]([^'"]+)['"]""", cell) if cell.startswith("[") else [cell]
    question = row.get("question", "Answer the question in the image.")
    if "hint" in row:
        question = f"Hint: {row['hint']}\nQuestion: {question}"
    if named := re.findall(r"<image (\d+)>", question):
        cells = [cells[int(number) - 1] for number in named]
        question = re.sub(r"<image \d+>", IMAGE, question)
    images = _images([decode_base64(cell) for cell in cells] if "image" in row else cells, config)
    choices = [row[letter] for letter in string.ascii_uppercase if letter in row]
    return _problem_with_images(id, question, row["answer"], images, row, choices)


def _messages_problem(row: dict, id: str, config: DataConfig) -> Problem:
    """Mixture-of-Thoughts: the user turn of {"messages": [{role, content}]}; there is no gold answer."""
    return Problem(id, _text(row["messages"][0]["content"], "question"))


def _problem(id: str, question: str, gold) -> Problem:
    gold = str(gold) if isinstance(gold, int | float) else gold
    validate_gold(gold)
    return Problem(id, _text(question, "question"), gold)


def _problem_with_images(
    id: str, question: str, gold, images: tuple[Path, ...], row: dict, choices: Sequence[str] = ()
) -> Problem:
    """A problem that may have images and options. Images without marks go in front of the question; with options, gold
    becomes the letter."""
    problem = _problem(id, question, gold)
    question, marks = problem.question, problem.question.count(IMAGE)
    if not marks and images:
        question = IMAGE * len(images) + "\n" + question
    elif marks != len(images):
        raise ValueError(f"{marks} {IMAGE} marks but {len(images)} images")
    if choices:
        options = dict(zip(string.ascii_uppercase, map(str, choices), strict=False))
        problem = replace(problem, gold=_letter(problem.gold, options), choices=tuple(options.values()))
        question += "\nOptions:\n" + "".join(f"{letter}. {text}\n" for letter, text in options.items())
        question += "Answer with the letter of the right option."
    category = str(row.get("category") or row.get("skill") or "")
    return replace(problem, question=question, images=images, category=category)


def _letter(gold: str, options: dict[str, str]) -> str:
    """The letter of the option that `gold` names by its letter or by its text."""
    if gold.strip() in options:
        return gold.strip()
    named = [letter for letter, text in options.items() if gold.strip() == text.strip()]
    if len(named) != 1:
        raise ValueError(f"answer {gold!r} is not one of the options {', '.join(options)}")
    return named[0]


def _text(value, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or not text: {value!r}")
    return value


def _images(values: Sequence, config: DataConfig) -> tuple[Path, ...]:
    return tuple(_image(value, config) for value in values)


def _image(value: str | bytes | dict, config: DataConfig) -> Path:
    """The path of an image below the root; a picture that the data file itself holds is written to a file first."""
    root = (config.image_root or (config.path if config.path.is_dir() else config.path.parent)).resolve()
    if isinstance(value, dict):  # as `datasets` keeps pictures in Parquet
        value = value.get("bytes") or value["path"]
    if isinstance(value, bytes):
        path = store_picture(value, config.image_root or config.path.with_suffix(".images")).resolve()
    else:
        path = (root / value).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"image {value!r} lies outside {root}")
    check_picture(path)
    return path


# -- layouts: traces -----------------------------------------------------------------------------------------------


def _messages_trace(row: dict, id: str, config: DataConfig) -> TextTrace:
    """Mixture-of-Thoughts: the last user and assistant turns of {"messages": [{role, content}]}."""
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
    "virl39k": _virl39k,
    "vlaa": _vlaa,
    "vqa": _vqa,
    "vlmevalkit": _vlmevalkit,
    "messages": _messages_problem,
}
TRACE_LAYOUTS: dict[str, Callable] = {"messages": _messages_trace, "prompt-response": _prompt_response}
