"""`vold grade`: the grader's verdict on each row of a JSONL file, and the rule that decided it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

from vold.grading import Grader, Item
from vold.io import to_json
from vold.jsonl import LINE_BYTES

CHUNK_BYTES = 1 << 16  # read at once; rows that end in a chunk are graded together


def grade_file(file: Path, *, workers: int) -> None:
    """Print the rows of `file` ("-": standard input) with verdict, extracted, rule and seconds added, in order.

    A row holds "gold" (text or a number) and "response"; a "finish_reason" of "length", as in a run's samples.jsonl,
    marks a truncated response, "choices" are the texts of options, and "prompt" is the text that was asked. The file is
    graded chunk by chunk, and rows of a pipe as they arrive. A malformed row
    raises ValueError with its line number once the rows before it are printed; a gold answer that cannot be used gives
    the verdict "broken".
    """
    try:
        with _open(file) as stream, Grader(workers=workers) as grader:
            for rows, problem in _row_chunks(stream, "standard input" if str(file) == "-" else str(file)):
                _print_verdicts(rows, grader)
                if problem:
                    raise ValueError(problem)
    except BrokenPipeError:  # the reader has closed the pipe, as in `vold grade FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _open(file: Path) -> RawIOBase:
    try:
        return open(0 if str(file) == "-" else file, "rb", buffering=0)  # unbuffered: a read returns what is there
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); give a JSONL file, or - for a pipe") from None


def _print_verdicts(rows: list[dict], grader: Grader) -> None:
    items = [_item(row) for row in rows]
    for row, verdict in zip(rows, grader.grade(items), strict=True):
        result = {"verdict": verdict.outcome, "extracted": verdict.extracted, "rule": verdict.rule}
        sys.stdout.write(to_json(row | result | {"seconds": round(verdict.seconds, 6)}) + "\n")
    sys.stdout.flush()


def _item(row: dict) -> Item:
    choices, problem = row.get("choices") or (), row.get("prompt") or ""
    truncated = row.get("finish_reason") == "length"
    return Item(row["response"], str(row["gold"]), truncated, tuple(map(str, choices)), problem)


def _row_chunks(stream: RawIOBase, name: str) -> Iterator[tuple[list[dict], str]]:
    """(rows, "") for each chunk. At a malformed row: the rows before it and an error line; then the iterator ends."""
    number = 0
    for lines in _line_chunks(stream):
        rows: list[dict] = []
        for line in lines:
            number += 1
            try:
                if line.strip():
                    rows.append(_parse_row(line))
            except (ValueError, RecursionError) as error:
                yield rows, f"{name}:{number}: {error}"
                return
        yield rows, ""


def _line_chunks(stream: RawIOBase) -> Iterator[list[bytes]]:
    """The complete lines of each chunk, without newlines; at the end the last line."""
    incomplete = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        incomplete += chunk
        if len(incomplete) > LINE_BYTES:
            incomplete[LINE_BYTES:] = b""  # no row, and is reported as none
        if b"\n" in chunk:
            *lines, incomplete = incomplete.split(b"\n")
            yield lines
    yield [incomplete]


def _parse_row(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'a row is an object {{"gold": ..., "response": ...}}, found {type(row).__name__}')
    for key, kinds in (("gold", str | int | float), ("response", str)):
        if not isinstance(row.get(key), kinds) or isinstance(row[key], bool):
            problem = f"is {type(row[key]).__name__}" if key in row else "is missing"
            raise ValueError(f'"{key}" {problem}; it must be text' + (" or a number" if key == "gold" else ""))
    if not isinstance(row.get("choices") or [], list) or not isinstance(row.get("prompt") or "", str):
        raise ValueError('"choices" must be a list of texts and "prompt" a text')
    return row
