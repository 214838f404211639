"""The header of a GGUF file, walked before a library reads it: its counts and lengths may lie.

The gguf library makes Python objects of each element, for as many as a count says, also beyond the end of the file.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from vold.untrusted import check_regular

MOST_KEYS, MOST_TENSORS, MOST_DIMENSIONS = 10_000, 200_000, 4
MOST_ELEMENTS = 2_000_000
"""Elements of all arrays; a vocabulary of 262,144 tokens with types, scores and merges has 1.3 million."""
MOST_BYTES = 256 * 2**20
NAME_BYTES = 4096
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type -> bytes."""
STRING, ARRAY = 8, 9


def check_gguf(path: Path) -> None:
    """Raises ValueError, one line that names the file, where a count or length is beyond the file or what a model has;
    OSError where it cannot be read."""
    check_regular(path)
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: give a whole .gguf file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Walk(content).check()
            except (ValueError, struct.error) as error:
                reason = "it ends within its header" if isinstance(error, struct.error) else error
                raise ValueError(f"{path} cannot be read: {reason}; download it again") from None


class _Walk:
    """Steps over a header. `at`: the next byte."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at, self._elements = content, 4, 0

    def check(self) -> None:
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is none of 2 and 3, or its numbers are big-endian")
        tensors, keys = self._number("Q"), self._number("Q")
        for what, count, most in (("tensors", tensors, MOST_TENSORS), ("keys", keys, MOST_KEYS)):
            if count > most:
                raise ValueError(f"{count} {what} are over {most}")
        for _ in range(keys):
            self._step_over_text("a key's name", NAME_BYTES)
            self._step_over_value(self._number("I"))
        ends = [self._end_of_tensor() for _ in range(tensors)]
        if ends and max(ends) > len(self._content):
            raise ValueError("it ends before its tensors do")

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _step(self, size: int, what: str) -> None:
        self._at += size
        if self._at > min(len(self._content), MOST_BYTES):
            raise ValueError(f"{what} of {size} bytes ends beyond the header")

    def _step_over_text(self, what: str, most: int = MOST_BYTES) -> None:
        length = self._number("Q")
        if length > most:
            raise ValueError(f"{what} has {length} bytes, over {most}")
        self._step(length, what)

    def _step_over_value(self, kind: int) -> None:
        if kind == STRING:
            return self._step_over_text("a text")
        if kind in SCALARS:
            return self._step(SCALARS[kind], "a number")
        if kind != ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        self._elements += count
        if self._elements > MOST_ELEMENTS:
            raise ValueError(f"arrays of {self._elements} elements are over {MOST_ELEMENTS}")
        if kind in SCALARS:
            return self._step(count * SCALARS[kind], "an array")
        if kind != STRING:
            raise ValueError(f"an array of type {kind} is not supported")
        self._step_over_texts(count)

    def _step_over_texts(self, count: int) -> None:
        content, at, length_of = self._content, self._at, struct.Struct("<Q").unpack_from
        end = min(len(content), MOST_BYTES)
        for _ in range(count):
            at += 8 + length_of(content, at)[0]
            if at > end:
                raise ValueError("a text ends beyond the header")
        self._at = at

    def _end_of_tensor(self) -> int:
        """A bound from below on where its data ends, counted from the file's start."""
        self._step_over_text("a tensor's name", NAME_BYTES)
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions is over {MOST_DIMENSIONS}")
        self._step(8 * dimensions + 4, "a tensor's shape")
        return self._number("Q")
