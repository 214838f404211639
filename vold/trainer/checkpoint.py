"""Checkpoints that are whole or absent: fresh directory -> fsync -> rename -> pointer, each file's SHA-256 on record.

    checkpoints/step-000040/  rank-00000.safetensors ...  state.json  manifest.json
    checkpoints/latest        the name of the newest complete one
    checkpoints/best          of the one that did best so far, where a run asks for that (evaluation.best)

Every rank writes its own pieces (vold.trainer.shards), at once or in a background thread; rank 0 commits when all have
reported. What is in state.json: step (which is also the data position: rows and sampling seeds are functions of it),
schedule, Adam's update count, layout, versions. Objectives keep no state: a steered beta goes on from metrics.jsonl.
Only safetensors and JSON: loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from vold.models.language_model import LanguageModel
from vold.parallel.collectives import run_on_all_ranks
from vold.parallel.launch import Layout
from vold.trainer.optimizer import updates_made
from vold.trainer.shards import (
    Piece,
    PieceReader,
    load_average,
    load_optimizer,
    load_random_state,
    load_weights,
    random_state,
    snapshot,
    write_pieces,
)
from vold.trainer.trainer import Trainer


class Checkpoints:
    """The checkpoints of one run directory; the newest `keep` stay, and the best. Every method that writes or loads is
    called by all ranks. `asynchronous`: `save` returns once the state is copied to the CPU; `poll` commits it when it
    is written."""

    def __init__(self, run_dir: Path, layout: Layout, keep: int = 2, *, asynchronous: bool = False):
        self._root, self._layout, self._keep, self._asynchronous = run_dir / "checkpoints", layout, keep, asynchronous
        self._pending: _Write | None = None

    # -- saving ----------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, step: int, *, best: bool = False) -> None:
        """Save step `step` (completed updates) unless it is saved already. Visible to a reader only once every file of
        every rank is on disk; `best`: it is the best from then on. Raises ValueError on all ranks when any
        could not write."""
        self.wait()
        if run_on_all_ranks(self.latest_step)[0] == step:
            return
        partial = self._root / f".partial-{_name(step)}"
        run_on_all_ranks(lambda: self._start_directory(partial))
        pieces = {**snapshot(trainer.chunks, trainer.optimizer, trainer.average), **random_state()}
        updates = max(run_on_all_ranks(lambda: updates_made(trainer.optimizer)))
        state = {
            "step": step,
            "updates": updates,
            "schedule": trainer.schedule.state_dict(),
            "layout": _sizes(self._layout),
            "versions": {name: version(name) for name in ("vold", "torch", "megatron-core")},
        }
        self._pending = _Write(partial, state, pieces, best)
        if not self._asynchronous:
            self.wait()

    def poll(self) -> None:
        """Commit the background save if every rank has written; raise ValueError if one could not."""
        if self._pending is not None and all(run_on_all_ranks(lambda: not self._pending.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Finish the save under way, if there is one. Called before the next save and before the run ends."""
        write, self._pending = self._pending, None
        if write is None:
            return
        write.join()
        outcomes = run_on_all_ranks(lambda: (write.error, write.bytes, write.digest))
        errors = [error for error, _, _ in outcomes if error]
        if not errors:
            digests = {_file(rank): digest for rank, (_, _, digest) in enumerate(outcomes)}
            errors = [error for error in run_on_all_ranks(lambda: self._commit(write, digests)) if error]
        if errors:
            self._give_up(write, errors[0], sum(size for _, size, _ in outcomes))

    def _start_directory(self, partial: Path) -> None:
        if dist.get_rank() == 0:
            for leftover in self._root.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

    def _commit(self, write: _Write, digests: dict[str, str]) -> str:
        """On rank 0: state, manifest, rename, pointer, and only then what is no longer kept. Returns an error or ''."""
        if dist.get_rank() != 0:
            return ""
        partial, target = write.directory, self._root / _name(write.state["step"])
        try:
            _write_durably(partial / "state.json", json.dumps(write.state, indent=1))
            digests = {**digests, "state.json": _digest(partial / "state.json")}
            _write_durably(partial / "manifest.json", json.dumps({"sha256": digests}, indent=1))
            _fsync(partial)
            if target.exists():  # written by a run that died before its pointer moved, or gone back behind
                self._remove(target)
            os.replace(partial, target)
            _fsync(self._root)
            self._point("latest", target.name)
            if write.best:
                self._point("best", target.name)
            for old in self._obsolete(write.state["step"]):
                self._remove(old)
        except OSError as error:
            return str(error)
        return ""

    def set_best(self, step: int | None) -> None:
        """Point `best` at a step that is saved, or nowhere. For a run that goes on: its pointer may be older than
        `latest` (a kill between the two) or newer (the run went back)."""

        def point() -> None:
            if dist.get_rank() == 0 and step is not None:
                self._point("best", _name(step))
            elif dist.get_rank() == 0:
                (self._root / "best").unlink(missing_ok=True)

        run_on_all_ranks(point)

    def saved(self) -> dict[int, Path]:
        """Step -> its directory."""
        return {int(path.name[5:]): path for path in self._root.glob("step-*") if path.name[5:].isdecimal()}

    def _point(self, pointer: str, name: str) -> None:
        _write_durably(self._root / f".{pointer}", name + "\n")
        os.replace(self._root / f".{pointer}", self._root / pointer)
        _fsync(self._root)

    def _obsolete(self, newest: int) -> list[Path]:
        """All but the best and the newest `keep`; steps beyond the newest belong to a continuation that was given
        up."""
        steps = self.saved()
        kept = [self.best_step(), *sorted(step for step in steps if step <= newest)[-self._keep :]]
        return [path for step, path in steps.items() if step not in kept]

    def _remove(self, path: Path) -> None:
        """Out of sight first: a kill in the middle leaves no half checkpoint under a step's name. What is left of it
        goes with the next save."""
        aside = self._root / f".partial-removed-{path.name}"
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _give_up(self, write: _Write, error: str, needed: int) -> None:
        step, free = write.state["step"], shutil.disk_usage(self._root).free
        if dist.get_rank() == 0:
            shutil.rmtree(write.directory, ignore_errors=True)
        before = self.latest_step()
        raise ValueError(
            f"step {step} could not be saved: {error}; it needs {needed} bytes and {self._root} has {free} free; make "
            f"room, then --resume continues after " + (f"step {before}" if before is not None else "the start")
        )

    # -- loading ---------------------------------------------------------------------------------------------------

    def latest_step(self) -> int | None:
        """The step `latest` points at, or None without a checkpoint. Raises ValueError for a broken pointer."""
        return self._pointed("latest")

    def best_step(self) -> int | None:
        """The step `best` points at, or None. Raises ValueError for a broken pointer."""
        return self._pointed("best")

    def _pointed(self, pointer: str) -> int | None:
        pointer = self._root / pointer
        if not pointer.exists():
            return None
        name = pointer.read_bytes()[:40].decode(errors="replace").strip()
        if not name.startswith("step-") or not name[5:].isdecimal() or not (self._root / name).is_dir():
            known = ", ".join(sorted(p.name for p in self._root.glob("step-*"))) or "none"
            raise ValueError(f"{pointer} names {name!r}, which is no checkpoint here (there are: {known})")
        return int(name[5:])

    def load(self, trainer: Trainer, step: int) -> None:
        """Restore parameters, optimizer, schedule and, at an unchanged layout, random state; every file is checked
        against the manifest first. Raises ValueError on all ranks, naming the file, when one is not as it was."""
        path = self._root / _name(step)
        run_on_all_ranks(lambda: verify(path, dist.get_rank(), dist.get_world_size()))
        run_on_all_ranks(lambda: self._restore(trainer, path, step))

    def load_weights(self, chunks: Sequence[LanguageModel], step: int) -> None:
        """Parameters only, for an export."""
        path = self._root / _name(step)
        run_on_all_ranks(lambda: verify(path, dist.get_rank(), dist.get_world_size()))
        with PieceReader(shard_files(path)) as reader:
            load_weights(chunks, reader)

    def _restore(self, trainer: Trainer, path: Path, step: int) -> None:
        state = json.loads((path / "state.json").read_text())
        if state["step"] != step:
            raise ValueError(f"{path} holds step {state['step']}: it was renamed; give it its own name back")
        with PieceReader(shard_files(path)) as reader:
            load_weights(trainer.chunks, reader)
            load_optimizer(trainer.chunks, trainer.optimizer, reader, state["updates"])
            if trainer.average is not None:
                load_average(trainer.average, reader)
            if state["layout"] == _sizes(self._layout):
                load_random_state(reader)
        trainer.schedule.num_steps = 0  # Megatron's load adds to it
        trainer.schedule.load_state_dict(state["schedule"])


class _Write(threading.Thread):
    """One rank's file, written in the background. `error` is empty when it is safely on disk."""

    def __init__(self, directory: Path, state: dict, pieces: dict[str, Piece], best: bool):
        super().__init__(name="checkpoint", daemon=True)
        self.directory, self.state, self._pieces, self.best = directory, state, pieces, best
        self.error, self.digest = "", ""
        self.bytes = sum(piece.tensor.nbytes for piece in pieces.values())
        self.start()

    def run(self) -> None:
        file = self.directory / _file(dist.get_rank())
        try:
            write_pieces(file, self._pieces)
            _fsync(file)
            self.digest = _digest(file)
        except Exception as error:  # it must reach the main thread whatever it is
            self.error = str(error) or repr(error)
        self._pieces = {}


def verify(path: Path, rank: int = 0, world: int = 1) -> None:
    """Compare the files with the manifest, every world-th one. Raises ValueError naming the first that differs."""
    for name, digest in sorted(_manifest(path).items())[rank::world]:
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; restore it, or resume from another checkpoint")
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name} is damaged (SHA-256 differs); resume from another checkpoint")


def _manifest(path: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    manifest = path / "manifest.json"
    try:
        digests = json.loads(manifest.read_bytes())["sha256"]
        if "state.json" not in digests or any(Path(name).name != name for name in digests):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is missing or unreadable; this is not a checkpoint vold wrote") from None
    return digests


def shard_files(path: Path) -> list[Path]:
    return [path / name for name in sorted(_manifest(path)) if name.endswith(".safetensors")]


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _sizes(layout: Layout) -> dict[str, int | None]:
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "dp": layout.dp}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + ("" if text.endswith("\n") else "\n"))
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
