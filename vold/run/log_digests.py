"""Sizes and SHA-256 of logs that only grow: each checkpoint keeps them, so that a resumed run knows what was lost."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vold.untrusted import check_regular


class LogDigests:
    """Digests of logs while they grow; of each, only what was appended since the last call is read."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple] = {}  # the SHA-256 so far, and of how many bytes

    def of(self, path: Path) -> dict:
        """{"bytes", "sha256"} of a log."""
        digest, size = self._read.get(path, (hashlib.sha256(), 0))
        with path.open("rb") as file:
            file.seek(size)
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        self._read[path] = digest, size
        return {"bytes": size, "sha256": digest.hexdigest()}


def is_as_described(path: Path, then: dict) -> bool:
    """Whether a log begins with what `LogDigests.of` described. Raises ValueError for a pipe or a device."""
    beginning = b""
    if path.exists():
        check_regular(path)
        with path.open("rb") as file:
            beginning = file.read(then["bytes"])
    return hashlib.sha256(beginning).hexdigest() == then["sha256"]


def in_words(steps: list[int]) -> str:
    """ "step 3 is" or "steps 3-5, 8 are": numbers in order."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][1] == step - 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"steps {text} are" if len(steps) > 1 else f"step {text} is"
