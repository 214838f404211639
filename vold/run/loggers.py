"""Experiment trackers beside metrics.jsonl, by one key: `loggers: [tensorboard, wandb, trackio]`.

No tracker can end a run: one that cannot start or fails later is named once in a warning and left out from then on.
None needs a network: TensorBoard and trackio write files, wandb is offline (`wandb sync` uploads later) unless
WANDB_API_KEY or WANDB_MODE says otherwise.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

import yaml

from vold.io import log


class Sink(Protocol):
    """One opened tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """The trackers of `names`. Each is opened by the first step it gets, so a resumed run continues at its step.

    settings: the run's whole config, which the trackers show.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, settings: dict):
        self._open: dict[str, Sink] = {}
        self._names = list(dict.fromkeys(names))
        self._run_dir, self._settings = run_dir, settings

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """The finite numbers of one finished step (1-based)."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        metrics = {key: float(value) for key, value in numbers.items() if math.isfinite(value)}
        for name in list(self._names):
            self._try(name, lambda name=name: self._sink(name, step).log(step, metrics))

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, sink.close)
        self._open.clear()

    def _sink(self, name: str, step: int) -> Sink:
        if name not in self._open:
            self._open[name] = SINKS[name](self._run_dir, self._settings, step)
        return self._open[name]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._names = [other for other in self._names if other != name]
            self._open.pop(name, None)
            fix = f"; pip install {name}" if isinstance(error, ImportError) else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            log.warning(f"logger {name} is left out ({reason}{fix}); metrics.jsonl has everything")


class _TensorBoard:
    def __init__(self, run_dir: Path, settings: dict, step: int):
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=step)  # later steps were never saved
        self._writer.add_text("config", f"```\n{yaml.safe_dump(settings, sort_keys=False)}```", step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, settings: dict, step: int):
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run_id = run_dir / "wandb-run-id"  # a resumed run goes on in the same curve
        if not run_id.exists():
            run_id.write_text(uuid.uuid4().hex)
        about = {"project": "vold", "name": run_dir.name, "id": run_id.read_text(), "resume": "allow"}
        self._run = import_module("wandb").init(**about, dir=str(run_dir), config=settings, mode=mode)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_dir: Path, settings: dict, step: int):
        self._trackio = import_module("trackio")
        resume = "never" if step == 1 else "allow"
        self._trackio.init(project="vold", name=run_dir.name, config=settings, resume=resume, embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


SINKS: dict[str, Callable[[Path, dict, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
