"""One worker of reward functions: `python -m vold.grading.function_worker SECONDS BYTES PATH.py:NAME...`

    in   {"function": 0, "rows": [{"prompt": ..., "response_text": ..., ...}]}
    out  {"ready": true, "forms": ["one"], "files": {path: sha256}} once, or {"failed": reason};
         then per line {"results": [{"score": 1.0, ...} or "reason"], "retire": false}

The user's files are imported here and in no other process. SECONDS of CPU time a call, after which the kernel ends the
process (SIGPROF); an awaited call that waits as long is cancelled. BYTES of address space.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vold.grading.worker import address_space, limit, lines, private_stdout, send

SINGLE = ("prompt", "response_text", "response_ids", "gold", "images", "metadata", "finish_reason")
BATCH = ("prompts", "response_texts", "response_ids", "golds", "images", "metadata", "finish_reasons")
PREFIX = "vold_reward_"  # of the names of the modules that the user's files become
LARGEST = 1e6  # of a value; statistics of larger ones overflow
LONGEST = 300  # characters of a reason
FEEDBACK, LONGEST_FEEDBACK = "feedback", 4000  # the value that may be text, and its characters


@dataclass(frozen=True)
class RewardFunction:
    """A function, the names of the arguments that it takes, and its form."""

    function: Callable
    arguments: tuple[str, ...]
    batch: bool
    awaited: bool

    @property
    def form(self) -> str:
        """one: called for each response; group: called, or awaited, for all responses of a prompt together."""
        return "group" if self.batch or self.awaited else "one"

    def call(self, rows: list[dict], seconds: float) -> list[dict | str]:
        """Values of each row, or the reason why there are none."""
        if not self.awaited:
            return self._all(rows) if self.batch else [_checked(lambda row=row: self._one(row)) for row in rows]
        return asyncio.run(self._await_all(rows, seconds))

    def _one(self, row: dict) -> Any:
        return self.function(**{name: row[name] for name in self.arguments})

    def _columns(self, rows: list[dict]) -> dict[str, list]:
        return {name: [row[SINGLE[BATCH.index(name)]] for row in rows] for name in self.arguments}

    def _all(self, rows: list[dict]) -> list[dict | str]:
        try:
            return _each(self.function(**self._columns(rows)), len(rows))
        except Exception as error:
            return [reason_of(error)] * len(rows)

    async def _await_all(self, rows: list[dict], seconds: float) -> list[dict | str]:
        async def within(call: Any) -> Any:
            try:
                return await asyncio.wait_for(call, seconds)
            except TimeoutError as error:
                return error if str(error) else TimeoutError(f"no result within {seconds:g} s")
            except Exception as error:
                return error

        if self.batch:
            result = await within(self.function(**self._columns(rows)))
            return [reason_of(result)] * len(rows) if isinstance(result, Exception) else _each(result, len(rows))
        results = await asyncio.gather(*(within(self._one(row)) for row in rows))
        return [reason_of(r) if isinstance(r, Exception) else _checked(lambda r=r: r) for r in results]


def _each(result: Any, count: int) -> list[dict | str]:
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__") or len(result) != count:
        shown = f"{len(result)} values" if hasattr(result, "__len__") else type(result).__name__
        return [f"returned {shown} for {count} responses; return a list with one for each"] * count
    return [_checked(lambda value=value: value) for value in result]


def _checked(call: Callable[[], Any]) -> dict | str:
    try:
        return values_of(call())
    except Exception as error:
        return reason_of(error)


class BadReturn(Exception):
    """A function returned what is no reward; the message says what."""


def values_of(result: Any) -> dict[str, float | str]:
    """What a function returned as named finite numbers, "score" among them, and "feedback" in words. Raises
    BadReturn."""
    if not isinstance(result, Mapping):
        return {"score": _number(result, "")}
    if "score" not in result:
        raise BadReturn(
            f"returned a dict without 'score'; it has {', '.join(map(repr, list(result)[:8])) or 'nothing'}"
        )
    words = result.get(FEEDBACK)
    said = {FEEDBACK: words.strip()[:LONGEST_FEEDBACK]} if isinstance(words, str) else {}
    silent = {FEEDBACK} if words is None or said else set()
    return {str(name): _number(value, f" as {name!r}") for name, value in result.items() if name not in silent} | said


def _number(value: Any, where: str) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadReturn(f"returned {repr(value)[:60]}{where}, which is no number")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise BadReturn(f"returned {number}{where}; a reward is a finite number within ±{LARGEST:g}")
    return number


def reason_of(error: BaseException) -> str:
    """An exception on one line, with the line of the user's file that raised it."""
    if isinstance(error, BadReturn):
        return str(error)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(PREFIX)]
    files = {module.__file__ for module in modules}
    users = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f" ({Path(users[-1].filename).name} line {users[-1].lineno})" if users else ""
    return " ".join(f"{type(error).__name__}: {error}"[:LONGEST].split()) + where


def load(spec: str) -> RewardFunction:
    """Import the file of PATH.py:NAME and look at the function. Raises BadReturn with the reason where that fails."""
    path, _, name = spec.rpartition(":")
    function = getattr(_module(Path(path).resolve()), name, None)
    if not callable(function):
        raise BadReturn(f"the file has no function {name!r}")
    return describe(function)


def _module(path: Path) -> ModuleType:
    name = f"{PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # the file may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the suffix is .py"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadReturn(f"importing the file failed: {reason_of(error)}") from None
    return module


def describe(function: Callable) -> RewardFunction:
    """The form of a function by the names of its arguments. Raises BadReturn where they are not ours."""
    known = f"it may take {', '.join(SINGLE)}; or, for all responses of a prompt at once, {', '.join(BATCH)}"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise BadReturn(f"its arguments cannot be read; {known}") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    arguments = [p.name for p in named if p.name in SINGLE or p.name in BATCH]
    strange = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    strange += [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if strange:
        raise BadReturn(f"it takes {', '.join(map(repr, strange))}; {known}")
    plural, singular = set(arguments) - set(SINGLE), set(arguments) - set(BATCH)
    if plural and singular:
        raise BadReturn(f"it takes {min(plural)!r} and {min(singular)!r}, of both forms; {known}")
    if not arguments and not takes_all:
        raise BadReturn(f"it takes no argument; {known}")
    if takes_all:
        arguments = list(BATCH if plural else SINGLE)
    awaited = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return RewardFunction(function, tuple(arguments), bool(plural), awaited)


def imported_files(folders: set[Path]) -> dict[str, str]:
    """{path: SHA-256} of every imported file below the folders of the user's files, theirs included."""
    files = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if path.suffix == ".py" and path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts):
            resolved = path.resolve()
            ours = resolved.is_relative_to(Path(__file__).parents[1]) or resolved.is_relative_to(sys.base_prefix)
            if not ours and any(resolved.is_relative_to(folder) for folder in folders):
                files[str(resolved)] = hashlib.sha256(resolved.read_bytes()).hexdigest()
    return files


def main() -> None:
    seconds, max_bytes, specs = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    parent = os.getppid()
    output = private_stdout()
    limit(max_bytes)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    functions = []
    for spec in specs:
        try:
            functions.append(load(spec))
        except BadReturn as error:
            send(output, {"failed": f"{spec}: {error}"})
            return
    files = imported_files({Path(spec.rpartition(":")[0]).resolve().parent for spec in specs})
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(output, {"ready": True, "forms": [function.form for function in functions], "files": files})
    retire_at = (address_space() + 3 * max_bytes) / 4
    for line in lines(parent):
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            results = functions[job["function"]].call(job["rows"], seconds)
        except (Exception, SystemExit) as error:
            results = [reason_of(error)] * len(job["rows"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(output, {"results": results, "retire": address_space() > retire_at})


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, also while a function waits for something."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
