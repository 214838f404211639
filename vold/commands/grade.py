"""`vold grade`: the grader's verdict on each row of any JSONL file, and the rule that decided it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

from vold.grading import Grader

_CHUNK = 1 << 16  # bytes read at once; the rows that end in them are graded together


def run(file: Path, *, workers: int) -> None:
    """Print the rows of `file` ("-": standard input) with verdict, extracted, rule and seconds, in their order.

    A row holds "gold" (text or a number) and "response"; a "finish_reason" of "length", as in a run's samples.jsonl,
    marks a truncated response. Memory is a chunk's, and a pipe is answered as it speaks. A row that is none raises
    ValueError with its line number once the rows before it are out; a gold that cannot be used makes its row broken.
    """
    try:
        with _open(file) as stream, Grader(workers=workers) as grader:
            for rows, mistake in _portions(stream, "standard input" if str(file) == "-" else str(file)):
                _print(rows, grader)
                if mistake:
                    raise ValueError(mistake)
    except BrokenPipeError:  # the reader has seen enough, as in `vold grade FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _open(file: Path) -> RawIOBase:
    try:
        return open(0 if str(file) == "-" else file, "rb", buffering=0)  # unbuffered: a read returns what is there
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); give a JSONL file, or - for a pipe") from None


def _print(rows: list[dict], grader: Grader) -> None:
    items = [(row["response"], str(row["gold"]), row.get("finish_reason") == "length") for row in rows]
    for row, verdict in zip(rows, grader.grade(items), strict=True):
        found = {"verdict": verdict.outcome, "extracted": verdict.extracted, "rule": verdict.rule}
        print(json.dumps(row | found | {"seconds": round(verdict.seconds, 6)}))
    sys.stdout.flush()


def _portions(stream: RawIOBase, name: str) -> Iterator[tuple[list[dict], str]]:
    """(rows, "") for each chunk; the last time perhaps with what is wrong with the row that follows them."""
    number = 0
    for lines in _lines(stream):
        rows: list[dict] = []
        for line in lines:
            number += 1
            try:
                if line.strip():
                    rows.append(_row(line))
            except (ValueError, RecursionError) as error:
                yield rows, f"{name}:{number}: {error}"
                return
        yield rows, ""


def _lines(stream: RawIOBase) -> Iterator[list[bytes]]:
    rest = bytearray()
    while chunk := stream.read(_CHUNK):
        rest += chunk
        if b"\n" in chunk:
            *lines, rest = rest.split(b"\n")
            yield lines
    yield [rest]


def _row(line: bytes) -> dict:
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
            found = f"is {type(row[key]).__name__}" if key in row else "is missing"
            raise ValueError(f'"{key}" {found}; it must be text' + (" or a number" if key == "gold" else ""))
    return row
