"""Which pictures a page may show: samples.jsonl names them, and a run directory may be someone else's.

A picture is shown where it lies, links resolved, below the run, the folder that holds it, or a folder of data that the
run's config names; or where it is, byte for byte, one that the run recorded (inputs.jsonl), since its maker had it too.
A folder that holds a home directory or the whole machine counts for none of these.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vold.jsonl import read_jsonl
from vold.untrusted import check_size

from .read import RunRecord, mappings_in

PICTURE_BYTES = 64 * 2**20
RECORD, PICTURES = "inputs.jsonl", "pictures/"


def find_picture(run: RunRecord, name: str) -> Path:
    """The file of `name`: itself if absolute, else from the run directory, its parent, or where vold was started.

    Raises ValueError, with the reason in a few words, for a file that is not there, not the run's, or too large.
    """
    try:
        bases = (run.path, run.path.parent, Path())
        found = next((base / name for base in bases if (base / name).is_file()), None)
        if found is None:
            raise ValueError("no such file")
        path = found.resolve()
        check_size(path, PICTURE_BYTES)
        if not any(path.is_relative_to(folder) for folder in _folders(run)) and _digest(path) not in _recorded(
            run.path
        ):
            raise ValueError(f"is not shown: neither below the run's folders nor recorded in its {RECORD}")
    except OSError as error:
        raise ValueError(error.strerror) from None
    return path


def _folders(run: RunRecord) -> Iterator[Path]:
    home, temporary = (Path(os.path.realpath(folder)) for folder in (Path.home(), tempfile.gettempdir()))
    for named in (run.path, run.path.parent, *_data_folders(run.config)):
        folder = Path(os.path.realpath(named))
        if not home.is_relative_to(folder) and not temporary.is_relative_to(folder):
            yield folder


def _data_folders(config: Mapping[str, Any]) -> Iterator[Path]:
    evaluation = mappings_in(config).get("evaluation", {})
    for data in (mappings_in(config).get("data", {}), *mappings_in(evaluation.get("sets")).values()):
        if isinstance(path := data.get("path"), str):
            yield Path(path) if Path(path).is_dir() else Path(path).parent
        if isinstance(root := data.get("image_root"), str):
            yield Path(root)


@lru_cache(maxsize=64)
def _recorded(run_dir: Path) -> frozenset[str]:
    """SHA-256 of the pictures that a run recorded."""
    try:
        rows = read_jsonl(run_dir / RECORD)
    except (OSError, ValueError):
        return frozenset()
    return frozenset(str(row.get("sha256")) for row in rows if str(row.get("name")).startswith(PICTURES))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
