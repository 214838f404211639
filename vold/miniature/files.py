"""Directories that are complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(out_dir: Path) -> Iterator[Path]:
    """A new directory beside `out_dir`, renamed to it when the block succeeds; `out_dir` must not exist.

    After a failure the unfinished directory stays for a look, until the next attempt.
    """
    unfinished = out_dir.with_name(f".{out_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(out_dir)
