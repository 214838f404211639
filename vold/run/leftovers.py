"""What killed processes left: weights for engines in shared memory, and files and folders that were not finished."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from vold.io import log
from vold.jsonl import parse_row
from vold.processes import Process
from vold.run.lock import locked_run

WEIGHTS = "vold-weights-"
OWNER = "owner.json"
_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")  # see vold.io.atomic_path and export_checkpoint


def weights_prefix() -> str:
    """The beginning of the name of a folder for weights: of the run and the process that write it."""
    return f"{WEIGHTS}{locked_run()}-{psutil.Process().pid}-"


def sign(folder: Path) -> None:
    """Note this process as the owner of a folder of weights."""
    (folder / OWNER).write_text(json.dumps(Process.current().fields()) + "\n")


def dead_weights(directory: Path) -> list[Path]:
    """Folders of weights whose process, of this machine, is dead. A folder that tells no owner is not known to be."""
    return [path for path in _weights(directory) if (owner := _owner(path)) and owner.is_here and not owner.is_alive]


def unknown_weights(directory: Path) -> list[Path]:
    """Folders of weights without an owner, of an older vold or killed as it began, and those of other machines."""
    return [path for path in _weights(directory) if not (owner := _owner(path)) or not owner.is_here]


def unfinished(run_dir: Path) -> list[Path]:
    """Unfinished files and folders in a run directory of processes that are dead; the caller holds its lock, or only
    looks."""
    found = [path for path in run_dir.glob(".*.partial") if _is_dead(path)]
    found += [path for path in run_dir.glob("checkpoints/.*.partial") if _is_dead(path)]
    return sorted([*found, *run_dir.glob("checkpoints/.partial-*")])


def remove(paths: list[Path]) -> None:
    """Remove files and folders, and say so where there are any."""
    for path in paths:
        size = size_of(path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        log.info(f"removed {path} ({size / 2**20:.1f} MiB), which a killed process left")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _weights(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.glob(f"{WEIGHTS}*")) if path.is_dir() and not path.is_symlink())


def _owner(folder: Path) -> Process | None:
    try:
        return Process.from_fields(parse_row((folder / OWNER).read_bytes()))
    except OSError:
        return None


def _is_dead(path: Path) -> bool:
    """The process whose number the name ends in does not run here."""
    found = _PARTIAL.fullmatch(path.name)
    return found is not None and not psutil.pid_exists(int(found.group(1)))
