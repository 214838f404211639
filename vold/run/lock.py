"""One writer for a run directory: lock.json names it, with a heartbeat, and is taken over once the writer is dead.

On the holder's own machine its process tells whether it lives. On another machine the heartbeat does: the file changes
every few seconds, whatever the clocks of the two machines say.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vold.io import log
from vold.jsonl import parse_row
from vold.processes import Process

FILE = "lock.json"
HEARTBEAT_SECONDS = 5.0
RECORD_BYTES = 1 << 16
EXCLUSIVE_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""A holder on another machine whose heartbeat does not change for so long is dead."""

_held: weakref.WeakValueDictionary[Path, RunLock] = weakref.WeakValueDictionary()


class RunLock:
    """The lock of a run directory, from its making to `release`, garbage collection or the end of the process.

    Raises ValueError, naming the holder, where another process has it.
    """

    def __init__(self, run_dir: Path, verb: str):
        self._path = run_dir.resolve() / FILE
        if before := _held.get(self._path):
            before.release()  # an earlier run of this process
        self._record = {**Process.current().fields(), "verb": verb, "run_dir": str(self._path.parent)}
        self._record |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8)}
        _take(self._path, self._record)
        stop = threading.Event()
        threading.Thread(target=_beat, args=(self._path, self._record, stop), name="lock", daemon=True).start()
        self._release = weakref.finalize(self, _release, self._path, self._record["token"], stop)
        _held[self._path] = self

    def check(self) -> None:
        """Raise ValueError where another process has taken the lock over: this one was taken for dead."""
        record = _read(self._path)
        if record is not None and record.get("token") != self._record["token"]:
            raise ValueError(
                f"run_dir = {self._path.parent} was taken over by {describe(record)}, while this process gave no sign "
                "of life; it ends here and has written nothing since"
            )

    def release(self) -> None:
        """Remove the lock, where it is still this process's."""
        self._release()


def locked_run() -> str:
    """The name of the run directory that this process has locked last; "" without one."""
    return ([path.parent.name for path in _held] or [""])[-1]


def living_holder(run_dir: Path) -> str:
    """Who holds the lock of a run directory, as far as that is known without waiting; "" for nobody."""
    record = _read(run_dir / FILE)
    process = Process.from_fields(record)
    if record is None or process is None or (process.is_here and not process.is_alive):
        return ""
    return describe(record)


def describe(record: dict) -> str:
    """A holder in words."""
    process = Process.from_fields(record)
    if process is None:
        return "another process"
    return f"vold {record.get('verb')}, process {process.pid} on {process.host}, since {record.get('since')}"


def _take(path: Path, record: dict) -> None:
    """Write the lock, waiting for a sign of life of a holder that cannot be asked."""
    seen, since, told = None, time.monotonic(), False
    while True:
        with _exclusive(path) as file:
            content = file.read(RECORD_BYTES)
            holder = parse_row(content) if content else None
            alive = _is_alive(holder, path) if content else False
            if alive is None and content != seen:
                alive, seen = (None, content) if seen is None else (True, content)
            if alive is False or (alive is None and time.monotonic() - since > SILENCE_SECONDS):
                _write(file, record)
                return
        if alive:
            raise ValueError(
                f"run_dir = {path.parent} is in use by {describe(holder or {})}; end that process or wait for it, or "
                "choose another run_dir"
            )
        if not told:
            log.info(
                f"{path.parent}: {describe(holder or {})} had it; waiting {SILENCE_SECONDS:.0f} s for its heartbeat"
            )
            told = True
        time.sleep(1.0)


def _is_alive(holder: dict | None, path: Path) -> bool | None:
    """None where only the heartbeat can tell: it is of another machine, or not readable."""
    process = Process.from_fields(holder)
    if holder is None or process is None:
        return None
    if not process.is_here:
        return None
    return process.is_alive and process.pid != os.getpid() and _is_of(holder, path)


def _is_of(holder: dict, path: Path) -> bool:
    """The holder's lock is this file, and not one that was copied with its directory."""
    try:
        return os.path.samefile(Path(str(holder.get("run_dir"))) / FILE, path)
    except OSError:
        return True  # moved away below a living process


def _beat(path: Path, record: dict, stop: threading.Event) -> None:
    """Count in the file until the lock is released or lost. A directory that is gone or a disk that fails for a while
    is the run's concern, which names it at its next write."""
    beats = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        beats += 1
        with contextlib.suppress(OSError, ValueError), _exclusive(path) as file:
            if stop.is_set() or (parse_row(file.read(RECORD_BYTES)) or record).get("token") != record["token"]:
                return
            _write(file, {**record, "heartbeat": beats})


def _release(path: Path, token: str, stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(OSError):
        if (_read(path) or {}).get("token") == token:
            path.unlink()


def _read(path: Path) -> dict | None:
    """The lock's content, None where there is none or it is damaged."""
    try:
        with _opened(path, os.O_RDONLY, "rb") as file:
            return parse_row(file.read(RECORD_BYTES))
    except (OSError, ValueError):
        return None


def _write(file: BinaryIO, record: dict) -> None:
    file.seek(0)
    file.write(json.dumps(record).encode() + b"\n")
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _opened(path: Path, flags: int, mode: str) -> Iterator[BinaryIO]:
    """The file itself, never what a link leads to. Raises ValueError for a link, a folder, a pipe or a device."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ValueError(f"{path} is no ordinary file; delete it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no ordinary file; delete it")
    with os.fdopen(descriptor, mode) as file:
        yield file


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO]:
    """The file, opened for reading and writing, while no other process has it so. Some file systems have no such locks:
    there two processes that start in the same instant may both go on, and the heartbeat ends the first (`check`). So it
    is where a process, which need only be allowed to read the file, keeps the lock."""
    while True:
        with _opened(path, os.O_RDWR | os.O_CREAT, "r+b") as file:
            _wait_for(file)
            if os.fstat(file.fileno()).st_nlink:  # else the holder has removed it meanwhile
                yield file
                return


def _wait_for(file: BinaryIO) -> None:
    deadline = time.monotonic() + EXCLUSIVE_SECONDS
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return
