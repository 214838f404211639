"""Experiment trackers beside metrics.jsonl, by one key: `loggers: [tensorboard, wandb, trackio]`.

No tracker can end a run: one that cannot start or fails later is named once in a warning and left out from then on.
None needs a network: TensorBoard and trackio write files, wandb is offline (`wandb sync` uploads later) unless
WANDB_API_KEY or WANDB_MODE says otherwise.

A run is known by the id in its `wandb-run-id`, never by its name, which another may have. What a tracker on this
machine holds of a resumed run is replaced by the rows of metrics.jsonl: steps that were lost are not shown twice. A
wandb server keeps the first value that it got for a step.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import yaml

from vold.config.schema import TrackingConfig
from vold.io import log
from vold.jsonl import read_jsonl


class Sink(Protocol):
    """One opened tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """The trackers of `names`. Each is opened by the first step it gets, so a resumed run continues at its step.

    tracking: what the run is called there. settings: the run's whole config, which the trackers show.
    """

    def __init__(self, names: Sequence[str], tracking: TrackingConfig, run_dir: Path, settings: dict):
        self._open: dict[str, Sink] = {}
        self._names = list(dict.fromkeys(names))
        self._run = _Run(run_dir, tracking, settings)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """The finite numbers of one finished step (1-based)."""
        metrics = _finite_numbers(row)
        for name in list(self._names):
            self._try(name, lambda name=name: self._sink(name, step).log(step, metrics))

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, sink.close)
        self._open.clear()

    def _sink(self, name: str, step: int) -> Sink:
        if name not in self._open:
            self._open[name] = SINKS[name](self._run, step)
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


def _finite_numbers(row: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


@dataclass(frozen=True)
class _Run:
    directory: Path
    tracking: TrackingConfig
    settings: dict

    @property
    def name(self) -> str:
        return self.tracking.name or self.directory.resolve().name

    @property
    def id(self) -> str:
        """Made when first asked for, and kept in the run directory."""
        path = self.directory / "wandb-run-id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text().strip()

    def log_earlier_steps(self, sink: Sink, step: int) -> None:
        """Give `sink` the rows of metrics.jsonl before `step`."""
        path = self.directory / "metrics.jsonl"
        for row in read_jsonl(path) if path.exists() else ():
            if row.get("step", step) < step:
                sink.log(row["step"], _finite_numbers(row))


class _TensorBoard:
    def __init__(self, run: _Run, step: int):
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.directory / "tensorboard"), purge_step=step)  # later steps were never saved
        self._writer.add_text("config", f"```\n{yaml.safe_dump(run.settings, sort_keys=False)}```", step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: _Run, step: int):
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        replaces = mode == "offline" and step > 1 and self._remove_unsynced(run)
        tracking = run.tracking
        about = {"project": tracking.project, "entity": tracking.entity, "group": tracking.group, "name": run.name}
        about |= {"tags": tracking.tags or None, "id": run.id, "resume": "allow", "mode": mode}
        self._run = import_module("wandb").init(**about, dir=str(run.directory), config=run.settings)
        if replaces:
            run.log_earlier_steps(self, step)

    @staticmethod
    def _remove_unsynced(run: _Run) -> bool:
        """Remove what earlier processes of this run wrote. Returns False, and removes nothing, where some of it is on a
        server by now (`wandb sync` leaves a mark)."""
        earlier = list((run.directory / "wandb").glob(f"offline-run-*-{run.id}"))
        if any(file.suffix == ".synced" for directory in earlier for file in directory.iterdir()):
            return False
        for directory in earlier:
            shutil.rmtree(directory)
        return True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """trackio knows a run by its name alone, so the name ends in the id's first digits."""

    def __init__(self, run: _Run, step: int):
        self._trackio = import_module("trackio")
        tracking, name = run.tracking, f"{run.name}-{run.id[:6]}"
        local = not any(os.environ.get(variable) for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        if local and step > 1:
            for earlier in self._trackio.Api().runs(tracking.project):
                if earlier.name == name:
                    earlier.delete()
        about = {"project": tracking.project, "name": name, "group": tracking.group, "config": run.settings}
        self._trackio.init(**about, resume="never" if step == 1 else "allow", embed=False)
        if local and step > 1:
            run.log_earlier_steps(self, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


SINKS: dict[str, Callable[[_Run, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
