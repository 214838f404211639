"""Parts of a GPU day for the test of its scheduler: they take milliseconds, hang, or crash. Without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_day.journal import append_rows
from benchmarks.gpu_day.part import Context, Item

COLUMNS = ("item", "process")


def note(context: Context, name: str) -> None:
    """A row of results, on disk at once."""
    append_rows(context.out / "rows.csv", [{"item": name, "process": os.getpid()}], COLUMNS)


def quick(name: str) -> Item:
    return Item(name, lambda context: note(context, name), 0.1)


def hang(context: Context) -> None:
    """With a child that would outlive it, and that ignores what asks it to end."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    (context.out / "child.pid").write_text(str(child.pid))
    note(context, "hang began")
    time.sleep(600)


def crash(context: Context) -> None:
    print("illegal memory access")
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(context: Context) -> None:
    raise RuntimeError("no kernel image\nfor this device")


def wait(context: Context) -> None:
    """The first run of all is taken away here; the next one finds the file and goes on."""
    place = Path(context.out / "waited")
    if not place.exists():
        place.write_text("")
        time.sleep(600)
    note(context, "wait")


PARTS = {
    "good": [quick("a"), quick("b")],
    "hangs": [quick("before"), Item("hangs", hang, 0.1), quick("after")],
    "crashes": [quick("c"), Item("crashes", crash, 0.1), quick("d"), Item("fails", fail, 0.1), quick("e")],
    "slow": [quick("f"), Item("slow", lambda context: note(context, "slow"), 12)],
    "waits": [quick("g"), Item("wait", wait, 0.1), quick("h")],
}


def items(context: Context) -> list[Item]:
    return PARTS[sys.argv[1]]
