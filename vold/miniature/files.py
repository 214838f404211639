"""Directories that are complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished_directory(out_dir: Path) -> Iterator[Path]:
    """A scratch directory beside `out_dir`, renamed to it if the block succeeds; `out_dir` must not exist."""
    unfinished = out_dir.with_name(f".{out_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(out_dir)
