"""Checkpoints that are whole or absent: fresh directory -> fsync -> rename -> pointer, each file's SHA-256 on record.

    checkpoints/step-000040/  model-tp0-pp0.safetensors  optimizer-tp0-pp0.safetensors  state.json  manifest.json
    checkpoints/latest        the name of the newest complete one

Only safetensors and JSON: loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vold.parallel.launch import Layout
from vold.trainer.engine import Trainer
from vold.trainer.optimizer import load_optimizer_state, optimizer_state

RNG_KEY = "rng/torch"


class Checkpoints:
    """The checkpoints of one run directory; the newest `keep` stay."""

    def __init__(self, run_dir: Path, layout: Layout, keep: int = 2):
        self._root, self._layout, self._keep = run_dir / "checkpoints", layout, keep

    def save(self, trainer: Trainer, step: int) -> Path:
        """Write step `step` (completed updates). Visible to a reader only once every file is on disk."""
        target = self._root / _name(step)
        partial = self._root / f".partial-{_name(step)}"
        writer = dist.get_rank() == 0
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        if self._layout.dp_rank == 0:
            self._write_shard(trainer, partial)
        dist.barrier()
        if writer:
            _write_json(partial / "state.json", {"step": step, "schedule": trainer.schedule.state_dict()})
            self._commit(partial, target)
        dist.barrier()
        return target

    def latest_step(self) -> int | None:
        """The step `latest` points at, or None without a checkpoint. Raises ValueError for a broken pointer."""
        pointer = self._root / "latest"
        if not pointer.is_file():
            return None
        name = pointer.read_text().strip()
        if not name.startswith("step-") or not name[5:].isdigit() or not (self._root / name).is_dir():
            known = ", ".join(sorted(p.name for p in self._root.glob("step-*"))) or "none"
            raise ValueError(f"{pointer} names {name[:40]!r}, which is no checkpoint here (there are: {known})")
        return int(name[5:])

    def load(self, trainer: Trainer, step: int) -> None:
        """Restore parameters, optimizer, schedule and random state; every file is checked against the manifest."""
        path = self._root / _name(step)
        verify(path)
        parameters, optimizer = self._shard_names(path)
        load_parameters(trainer.parameters, parameters)
        state = _load_tensors(optimizer)
        torch.set_rng_state(state.pop(RNG_KEY))
        load_optimizer_state(trainer.optimizer, trainer.parameters, state)
        trainer.schedule.load_state_dict(json.loads((path / "state.json").read_text())["schedule"])

    def model_file(self, step: int) -> Path:
        """The verified weights of this rank's shard."""
        path = self._root / _name(step)
        verify(path)
        return self._shard_names(path)[0]

    def _shard_names(self, path: Path) -> tuple[Path, Path]:
        shard = f"tp{self._layout.tp_rank}-pp{self._layout.pp_rank}.safetensors"
        return path / f"model-{shard}", path / f"optimizer-{shard}"

    def _write_shard(self, trainer: Trainer, partial: Path) -> None:
        model, optimizer = self._shard_names(partial)
        save_file({name: p.data.contiguous() for name, p in trainer.parameters.items()}, model)
        state = optimizer_state(trainer.optimizer, trainer.parameters)
        state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        save_file({**state, RNG_KEY: torch.get_rng_state()}, optimizer)

    def _commit(self, partial: Path, target: Path) -> None:
        files = sorted(p for p in partial.iterdir() if p.is_file())
        _write_json(partial / "manifest.json", {"sha256": {p.name: _digest(p) for p in files}})
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _fsync(self._root)
        pointer = self._root / ".latest"
        pointer.write_text(target.name + "\n")
        _fsync(pointer)
        os.replace(pointer, self._root / "latest")
        _fsync(self._root)
        for old in sorted(self._root.glob("step-*"))[: -self._keep]:
            if old != target:
                shutil.rmtree(old)


def load_parameters(parameters: dict[str, torch.nn.Parameter], file: Path) -> None:
    """Copy a saved shard into live parameters; raises ValueError naming a missing or misshapen tensor."""
    saved = _load_tensors(file)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[0]
        raise ValueError(f"{file} and the model differ in {odd!r}; the checkpoint is of another student or layout")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise ValueError(f"{file}: {name} is {tuple(saved[name].shape)}, the model's {tuple(parameter.shape)}")
            parameter.copy_(saved[name])


def verify(path: Path) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first that differs."""
    manifest = path / "manifest.json"
    try:
        digests = json.loads(manifest.read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{manifest} is missing or unreadable; this is not a checkpoint vold wrote") from None
    for name, digest in digests.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; restore it, or resume from another checkpoint")
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name} is damaged (SHA-256 differs); resume from another checkpoint")


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
