"""One part in a process of its own: its items in order, each with its rows on disk before the next.

A part's module has `items(context) -> list[Item]`, with names that do not change. With `fresh` each item gets a process
of its own. An item that raises is a row with its reason, and ends the process, since a CUDA error stays with it; the
scheduler starts another one for the rest.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.metadata
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .journal import DONE, FAILED, NO_TIME, PLANNED, STARTED, Journal, append_rows
from .schedule import MORE

if TYPE_CHECKING:
    import torch

Rows = Iterable[Mapping[str, object]]
MIB = 2**20


@dataclass
class Context:
    """What an item may use. `out`: the folder of results. dry_run: tiny sizes, on the CPU."""

    out: Path
    dry_run: bool
    ends: float = field(default=float("inf"))
    """time.monotonic() at which the process is killed."""

    @cached_property
    def device(self) -> torch.device:
        import torch

        if not self.dry_run and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device: a GPU day on a CPU is ARGS=--dry-run")
        return torch.device("cpu" if self.dry_run else "cuda")

    @cached_property
    def facts(self) -> dict[str, str]:
        """Device with driver, versions, commit, start: the columns of every row."""
        from benchmarks.harness import environment

        return environment(self.device, 1)

    def write(self, file: str, rows: Rows, columns: tuple[str, ...]) -> None:
        """Each row is on disk before the next one is asked for, with the facts."""
        for row in rows:
            append_rows(self.out / file, [dict(row) | self.facts], columns)

    def left(self) -> float:
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Item:
    """`run` writes its rows itself (`Context.write`). seconds: it is not begun with less left."""

    name: str
    run: Callable[[Context], None]
    seconds: float = 5.0


FACTS = ("device", "torch", "triton", "python", "commit", "started")
CHECK_COLUMNS = ("check", "value", "limit", "passed", "note", *FACTS)


def check(name: str, value: float, limit: float, note: str = "") -> dict[str, object]:
    """A row of checks.csv: passed where value ≤ limit (NaN is not)."""
    return {
        "check": name,
        "value": f"{value:.3g}",
        "limit": f"{limit:.3g}",
        "passed": _word(value <= limit),
        "note": note,
    }


def verdict(name: str, passed: bool, note: str = "") -> dict[str, object]:
    return {"check": name, "passed": _word(passed), "note": note}


def _word(passed: bool) -> str:
    return "yes" if passed else "no"


def main() -> int:
    name, module_name, out, limit, *flags = sys.argv[1:]
    faulthandler.dump_traceback_later(max(float(limit) - 1, 1))  # where a hanging part hung; the scheduler kills it
    context = Context(Path(out), "--dry-run" in flags, time.monotonic() + float(limit))
    if "--interpret" in flags and can_interpret():
        os.environ["TRITON_INTERPRET"] = "1"
    journal = Journal(context.out / "parts.csv")
    module = importlib.import_module(module_name)
    items = module.items(context)
    known = journal.states(name)
    for item in items:
        if item.name not in known:
            journal.note(name, item.name, PLANNED)
    waiting = [item for item in items if known.get(item.name) not in (DONE, FAILED)]
    for position, item in enumerate(waiting):
        if context.left() < item.seconds:
            journal.note(
                name, item.name, NO_TIME, reason=f"needs {item.seconds:.0f} s, {context.left():.0f} s were left"
            )
            continue
        if not _run_item(name, item, context, journal):
            return MORE
        if "--fresh" in flags and position + 1 < len(waiting):
            return MORE
    return 0


def _run_item(part: str, item: Item, context: Context, journal: Journal) -> bool:
    """False where it failed."""
    journal.note(part, item.name, STARTED)
    started = time.monotonic()
    try:
        item.run(context)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        journal.note(part, item.name, FAILED, seconds=time.monotonic() - started, reason=reason)
        return False
    journal.note(part, item.name, DONE, seconds=time.monotonic() - started)
    return True


def can_interpret() -> bool:
    """Triton's interpreter works: since 3.7, or with an older numpy."""

    def version(package: str) -> tuple[int, ...]:
        try:
            return tuple(map(int, importlib.metadata.version(package).split("+")[0].split(".")[:2]))
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return ()

    triton = version("triton")
    return triton >= (3, 7) or (bool(triton) and version("numpy") < (2, 4))


if __name__ == "__main__":
    sys.exit(main())
