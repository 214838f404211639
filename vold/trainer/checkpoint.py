"""Checkpoints that are complete or absent: fresh directory -> fsync -> rename -> pointer, with each file's SHA-256.

    checkpoints/step-000040/  rank-00000.safetensors ...  state.json  steering.json  manifest.json
    checkpoints/latest        the name of the newest complete one
    checkpoints/best          the name of the one with the best score so far (evaluation.best)

Every rank writes its own pieces (vold.trainer.shards), in `save` or in a background thread; rank 0 commits when all
have finished. state.json holds the step (which is also the data position: rows and sampling seeds are functions of it),
the schedule, Adam's update count, layout and versions. steering.json holds what else decides about the next steps (see
TrainingRun): nothing is read back from metrics.jsonl or prompts.jsonl.
Only safetensors and JSON: loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from vold.file_errors import file_error_line
from vold.io import flush_to_disk, to_json, write_atomically
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
from vold.untrusted import check_regular, is_plain_name, read_json

STATE_KEYS = {"step", "updates", "schedule", "layout"}  # that loading needs


class Checkpoints:
    """The checkpoints of one run directory. Every method that writes or loads is called by all ranks.

    keep: how many of the newest stay, beside the best. asynchronous: `save` returns once the state is copied to the
    CPU; `poll` commits it when it is written.
    """

    def __init__(self, run_dir: Path, layout: Layout, keep: int = 2, *, asynchronous: bool = False):
        self._root, self._layout, self._keep, self._asynchronous = run_dir / "checkpoints", layout, keep, asynchronous
        self._pending: _ShardWriter | None = None

    # -- saving ----------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, step: int, *, best: bool = False, steering: dict | None = None) -> None:
        """Save step `step` (completed updates) unless it is saved already; with `best`, point `best` at it. Rank 0's
        `steering`, of JSON values, is kept with it. Readers see
        it only once every file of every rank is on disk. Raises ValueError on all ranks when one could not write."""
        self.wait()
        if run_on_all_ranks(self.latest_step)[0] == step:
            return
        partial = self._root / f".partial-{_step_name(step)}"
        run_on_all_ranks(lambda: self._start_directory(partial))
        pieces = {**snapshot(trainer.chunks, trainer.optimizer, trainer.average), **random_state()}
        updates = max(run_on_all_ranks(lambda: updates_made(trainer.optimizer)))
        state = {
            "step": step,
            "updates": updates,
            "schedule": trainer.schedule.state_dict(),
            "layout": _layout_sizes(self._layout),
            "versions": {name: version(name) for name in ("vold", "torch", "megatron-core")},
        }
        self._pending = _ShardWriter(partial, state, pieces, best, to_json(steering or {}))
        if not self._asynchronous:
            self.wait()

    def poll(self) -> None:
        """Commit the background save if every rank has written; raise ValueError if one could not."""
        pending = self._pending
        if pending is not None and all(run_on_all_ranks(lambda: not pending.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Wait for the background save, if there is one, and commit it. Called before the next save and before the run
        ends."""
        writer, self._pending = self._pending, None
        if writer is None:
            return
        writer.join()
        outcomes = run_on_all_ranks(lambda: (writer.error, writer.bytes, writer.digest))
        errors = [error for error, _, _ in outcomes if error]
        if not errors:
            digests = {_shard_name(rank): digest for rank, (_, _, digest) in enumerate(outcomes)}
            errors = [error for error in run_on_all_ranks(lambda: self._commit(writer, digests)) if error]
        if errors:
            self._abandon(writer, errors[0], sum(size for _, size, _ in outcomes))

    def _start_directory(self, partial: Path) -> None:
        if dist.get_rank() == 0:
            for leftover in self._root.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in self._root.glob(".*.partial"):  # of a pointer whose writer was killed
                leftover.unlink()
            partial.mkdir(parents=True)

    def _commit(self, writer: _ShardWriter, digests: dict[str, str]) -> str:
        """On rank 0: write state and manifest, rename, set the pointers, and only then remove what is no longer kept.
        Returns an error or ''."""
        if dist.get_rank() != 0:
            return ""
        partial, target = writer.directory, self._root / _step_name(writer.state["step"])
        try:
            write_atomically(partial / "state.json", to_json(writer.state, indent=1) + "\n", durable=True)
            write_atomically(partial / "steering.json", writer.steering + "\n", durable=True)
            digests |= {name: _digest(partial / name) for name in ("state.json", "steering.json")}
            write_atomically(partial / "manifest.json", to_json({"sha256": digests}, indent=1) + "\n", durable=True)
            if target.exists():  # of a run that died before it moved the pointer, or that went back behind this step
                self._remove(target)
            os.replace(partial, target)
            flush_to_disk(self._root)
            self._set_pointer("latest", target.name)
            if writer.best:
                self._set_pointer("best", target.name)
            for old in self._obsolete(writer.state["step"]):
                self._remove(old)
        except OSError as error:
            return file_error_line(error) or str(error)
        return ""

    def set_best(self, step: int | None) -> None:
        """Point `best` at a saved step, or remove it. For a resumed run, whose pointer may be older than `latest` (a
        kill between the two) or newer (the run went back)."""

        def update() -> None:
            if dist.get_rank() == 0 and step is not None:
                self._set_pointer("best", _step_name(step))
            elif dist.get_rank() == 0:
                (self._root / "best").unlink(missing_ok=True)

        run_on_all_ranks(update)

    def saved(self) -> dict[int, Path]:
        """The checkpoints there are: step -> directory."""
        return {int(path.name[5:]): path for path in self._root.glob("step-*") if path.name[5:].isdecimal()}

    def _set_pointer(self, pointer: str, name: str) -> None:
        write_atomically(self._root / pointer, name + "\n", durable=True)

    def _obsolete(self, newest: int) -> list[Path]:
        """Directories of all steps but the best and the newest `keep`. Steps beyond `newest` are of an abandoned
        continuation."""
        directories = self.saved()
        kept = [self.best_step(), *sorted(step for step in directories if step <= newest)[-self._keep :]]
        return [path for step, path in directories.items() if step not in kept]

    def _remove(self, path: Path) -> None:
        """Rename, then remove: a kill in the middle leaves no half checkpoint under a step's name, and the next save
        removes the rest."""
        renamed = self._root / f".partial-removed-{path.name}"
        os.replace(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)

    def _abandon(self, writer: _ShardWriter, error: str, needed: int) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(writer.directory, ignore_errors=True)
        before = self.latest_step()
        with contextlib.suppress(OSError):  # a file server that is gone does not say
            free = shutil.disk_usage(self._root).free
            error += f" (it needs {needed} bytes and {self._root} has {free} free)"
        raise ValueError(
            f"step {writer.state['step']} could not be saved: {error}; then --resume continues after "
            + (f"step {before}" if before is not None else "the start")
        )

    # -- loading ---------------------------------------------------------------------------------------------------

    def latest_step(self) -> int | None:
        """The step `latest` points at, or None without a checkpoint. Raises ValueError for a broken pointer."""
        return self._read_pointer("latest")

    def best_step(self) -> int | None:
        """The step `best` points at, or None. Raises ValueError for a broken pointer."""
        return self._read_pointer("best")

    def _read_pointer(self, pointer: str) -> int | None:
        path = self._root / pointer
        if not path.exists():
            return None
        check_regular(path)
        with path.open("rb") as file:
            name = file.read(40).decode(errors="replace").strip()
        if not name.startswith("step-") or not name[5:].isdecimal() or not (self._root / name).is_dir():
            known = ", ".join(sorted(p.name for p in self._root.glob("step-*"))) or "none"
            raise ValueError(f"{path} names {name!r}, which is no checkpoint here (there are: {known})")
        return int(name[5:])

    def load(self, trainer: Trainer, step: int) -> None:
        """Restore parameters, optimizer, schedule and, at an unchanged layout, random state; every file is checked
        against the manifest first. Raises ValueError on all ranks, naming the file, when one is damaged."""
        path = self._root / _step_name(step)
        run_on_all_ranks(lambda: verify(path, dist.get_rank(), dist.get_world_size()))
        run_on_all_ranks(lambda: self._restore(trainer, path, step))

    def steering(self, step: int) -> dict | None:
        """What `save` was given, on rank 0 and after `load`; None on other ranks, and for a checkpoint of an older
        vold, which has none."""
        path = self._root / _step_name(step)
        if dist.get_rank() != 0 or "steering.json" not in _manifest(path):
            return None
        return read_json(path / "steering.json", most_bytes=1 << 31)

    def load_weights(self, chunks: Sequence[LanguageModel], step: int) -> None:
        """Restore parameters only, for an export."""
        path = self._root / _step_name(step)
        run_on_all_ranks(lambda: verify(path, dist.get_rank(), dist.get_world_size()))
        with PieceReader(shard_files(path)) as reader:
            load_weights(chunks, reader)

    def _restore(self, trainer: Trainer, path: Path, step: int) -> None:
        state = read_json(path / "state.json")
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            raise ValueError(f"{path / 'state.json'} is not one that vold wrote; resume from another checkpoint")
        if state["step"] != step:
            raise ValueError(f"{path} holds step {state['step']}: it was renamed; give it its own name back")
        with PieceReader(shard_files(path)) as reader:
            load_weights(trainer.chunks, reader)
            load_optimizer(trainer.chunks, trainer.optimizer, reader, state["updates"])
            if trainer.average is not None:
                load_average(trainer.average, reader)
            if state["layout"] == _layout_sizes(self._layout):
                load_random_state(reader)
        trainer.schedule.num_steps = 0  # only the count is restored: the rest is the config's, whose `steps` may grow
        trainer.schedule.step(state["schedule"]["num_steps"])


class _ShardWriter(threading.Thread):
    """Writes one rank's file in the background. `error` is empty when the file is on disk."""

    def __init__(self, directory: Path, state: dict, pieces: dict[str, Piece], best: bool, steering: str):
        super().__init__(name="checkpoint", daemon=True)
        self.directory, self.state, self._pieces, self.best = directory, state, pieces, best
        self.steering = steering
        self.error, self.digest = "", ""
        self.bytes = sum(piece.tensor.nbytes for piece in pieces.values())
        self.start()

    def run(self) -> None:
        file = self.directory / _shard_name(dist.get_rank())
        try:
            write_pieces(file, self._pieces)
            flush_to_disk(file)
            self.digest = _digest(file)
        except Exception as error:  # it must reach the main thread whatever it is
            if (line := file_error_line(error)) and getattr(error, "filename", None) is None:
                line = f"{file}: {line.partition(': ')[2]}"
            self.error = line or str(error) or repr(error)
        self._pieces = {}


def verify(path: Path, rank: int = 0, world: int = 1) -> None:
    """Compare a checkpoint's files with its manifest; each rank takes every world-th one. Raises ValueError naming the
    first that differs."""
    for name, digest in sorted(_manifest(path).items())[rank::world]:
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; restore it, or resume from another checkpoint")
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name} is damaged (SHA-256 differs); resume from another checkpoint")


def _manifest(path: Path) -> dict[str, str]:
    """File name -> SHA-256. Raises ValueError where there is no manifest."""
    manifest = path / "manifest.json"
    try:
        digests = read_json(manifest)["sha256"]
        if "state.json" not in digests or not all(map(is_plain_name, digests)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is missing or unreadable; this is not a checkpoint vold wrote") from None
    return digests


def shard_files(path: Path) -> list[Path]:
    """The ranks' files of a checkpoint."""
    return [path / name for name in sorted(_manifest(path)) if name.endswith(".safetensors")]


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _layout_sizes(layout: Layout) -> dict[str, int | None]:
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "dp": layout.dp}
    return sizes | ({"cp": layout.cp} if layout.cp > 1 else {})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
