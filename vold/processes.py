"""Processes that own files: told from others by machine, number and start, so that what a dead one left is known."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Process:
    """host: its name, for people. machine: the boot of the machine and its namespace of process numbers. started:
    seconds since the epoch."""

    host: str
    machine: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Process:
        return cls(socket.gethostname(), this_machine(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def from_fields(cls, fields: object) -> Process | None:
        """The process that `fields` describes (see `fields`), None where they describe none."""
        if not isinstance(fields, dict):
            return None
        kinds = {"host": str, "machine": str, "pid": int, "started": float}
        values = {name: fields.get(name) for name in kinds}
        return cls(**values) if all(isinstance(values[name], kind) for name, kind in kinds.items()) else None

    def fields(self) -> dict:
        return asdict(self)

    @property
    def is_here(self) -> bool:
        """It runs, or ran, on this machine since the machine started: `is_alive` can tell."""
        return self.machine == this_machine()

    @property
    def is_alive(self) -> bool:
        """A process of this number and start runs on this machine. A zombie does not run."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


@lru_cache(maxsize=1)
def this_machine() -> str:
    """This boot of this machine, with the namespace of its process numbers: containers may share a kernel or a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
