"""Files that are complete or absent, text from outside shown on one line, and the logger."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LINE_CHARACTERS = 2000
"""Longest line about a mistake: it may quote a value, and a value may be a picture."""
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")
log = logging.getLogger("vold")
"""Information goes to standard output, warnings to standard error behind `vold: `."""


class _ConsoleHandler(logging.Handler):
    """Writes to whatever sys.stdout and sys.stderr are when a record arrives. Hidden characters of names and paths are
    shown (see `visible`), so that none reaches the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        message = visible(record.getMessage(), multiline=True)
        if record.levelno >= logging.WARNING:
            print(f"vold: {message}", file=sys.stderr, flush=True)
        else:
            print(message, flush=True)


class _FileHandler(logging.FileHandler):
    """Appends to a file, each record with its time; a full disk costs lines, never the run."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{moment} {record.levelname:<7} {visible(record.getMessage(), multiline=True)}"

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: the run's own rows meet the same disk, and say what is wrong."""


def configure_logging() -> None:
    """Send vold's log to the console, once per process. A handler that the application has added stays alone."""
    if not log.handlers:
        console = _ConsoleHandler(logging.INFO)
        log.addHandler(console)
        log.setLevel(logging.DEBUG)


def set_console_level(level: int) -> None:
    """What the console shows from here on: logging.WARNING (--quiet), INFO, DEBUG (--verbose)."""
    configure_logging()
    for handler in log.handlers:
        if isinstance(handler, _ConsoleHandler):
            handler.setLevel(level)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Also append the log to a file. Raises OSError where it cannot be opened."""
    handler = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block succeeds and removed when it fails.

    durable: the file and its directory are flushed to disk first, so that the file also survives a machine crash. A
    device or a pipe (/dev/stdout) is written to directly: a rename would replace it by a file. Raises OSError naming
    `path`.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            flush_to_disk(partial)
        os.replace(partial, path)
        if durable:
            flush_to_disk(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == partial:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a whole file, or leave `path` as it was. Text is UTF-8."""
    with atomic_path(path, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory. Raises OSError naming it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append one JSON object per line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: null for NaN and infinities, for which JSON has no spelling."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def visible(text: str, *, multiline: bool = False) -> str:
    """Text in which nothing hides: control, format and line-separating characters are shown as ⟨code point⟩.

    multiline: newlines and tabs stay.
    """
    kept = "\n\t" if multiline else ""

    def shown(match: re.Match) -> str:
        c = match[0]
        return c if c in kept or not _is_hidden(c) else f"⟨{ord(c):04X}⟩"

    return _NOT_ASCII.sub(shown, text)


def one_line(text: str, most: int = LINE_CHARACTERS) -> str:
    """`visible` text; of a longer one the beginning and the end."""
    text = text if len(text) <= most else f"{text[: most // 2]} … ({len(text)} characters) … {text[-most // 4 :]}"
    return visible(text)


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Re-raise a ValueError from inside with its message on one line (see `one_line`): names and values in it may come
    from a file or a command line."""
    try:
        yield
    except ValueError as error:
        message = one_line(str(error))
        if message == str(error):
            raise
        raise ValueError(message) from None
