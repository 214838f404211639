"""Processes of the chaos campaign: a launcher that behaves as torchrun does, its ranks, and faults inside them.

Ranks are forked from a server that has imported everything: with torchrun each would import for some seconds, and the
campaign makes hundreds.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vold.io import write_atomically

PRELOADED = ["torch", "vold.cli", "vold.train.sft", "vold.train.rl", "vold.trainer.checkpoint"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)

ERRNOS = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EDQUOT)


@dataclass(frozen=True)
class Inside:
    """A fault inside one rank: at the `number`-th call of `where` (a key of PLACES), for some only below a folder."""

    rank: int
    where: str
    number: int
    errno: int = errno.ENOSPC
    below: str = ""


class Launch:
    """A running launcher with its ranks; their output is in `folder`."""

    def __init__(self, arguments: list[str], world: int, folder: Path, inside: Inside | None = None):
        folder.mkdir(parents=True)
        self.folder, self._world = folder, world
        self.launcher = _FORKS.Process(target=_launch, args=(arguments, world, folder, inside))
        self.launcher.start()
        wait_until(lambda: (folder / "pids.json").exists(), 300.0)
        self.pids: list[int] = json.loads((folder / "pids.json").read_text())

    def signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait until launcher and ranks are gone; False, with all of them killed, after `seconds`."""
        ended = wait_until(lambda: not any(map(_lives, [self.launcher.pid, *self.pids])), seconds)
        if not ended:
            self.signal([self.launcher.pid, *self.pids], signal.SIGKILL)
        self.launcher.join()
        return ended

    @property
    def codes(self) -> list[int] | None:
        """Exit codes of the ranks; None where the launcher did not live to see them."""
        path = self.folder / "codes.json"
        return json.loads(path.read_text()) if path.exists() else None

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.log")))


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- inside the processes ------------------------------------------------------------------------------------------


def _launch(arguments: list[str], world: int, folder: Path, inside: Inside | None) -> None:
    """Fork the ranks, keep their rendezvous store, pass signals on, and end the others when one fails."""
    pipes = [os.pipe() for _ in range(world)]
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # a campaign in the background ignores some, and so would they
            _rank(rank, world, int(os.read(pipes[rank][0], 16)), arguments, folder, inside)
        pids.append(pid)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda got, _: [_kill(pid, got) for pid in pids])
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, end in pipes:
        os.write(end, str(store.port).encode())
    write_atomically(folder / "pids.json", json.dumps(pids))
    codes: dict[int, int] = {}
    while len(codes) < world:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] not in (0, 129, 130, 143):
            for other in pids:
                _kill(other, signal.SIGTERM)
    write_atomically(folder / "codes.json", json.dumps([codes[pid] for pid in pids]))
    os._exit(0)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _rank(rank: int, world: int, port: int, arguments: list[str], folder: Path, inside: Inside | None) -> None:
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="chaos")
        _grade_by_length()
        if inside and inside.rank == rank:
            PLACES[inside.where](inside)
        sys.argv = ["vold", *arguments]
        from vold import cli

        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _grade_by_length() -> None:
    """An untrained student never answers; the parity of a response's length gives groups of mixed rewards."""
    from vold.train import rollout_worker
    from vold.types import Group, Verdict

    def grade(rollouts, *_) -> Group:
        rewards = tuple(float(len(rollout.response_ids) % 2) for rollout in rollouts)
        verdicts = tuple(Verdict("correct" if reward else "wrong", None, "length") for reward in rewards)
        return Group(rollouts[0].prompt, tuple(rollouts), verdicts, rewards)

    rollout_worker.grade_group = grade


def _at_call(owner: object, name: str, inside: Inside, action) -> None:
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        calls[0] += 1
        return (action if calls[0] == inside.number else (lambda call, *a, **k: call(*a, **k)))(
            original, *arguments, **keywords
        )

    setattr(owner, name, counted)


def _fails(inside: Inside):
    def action(_original, *arguments, **_keywords):
        named = [str(arguments[0])] if isinstance(arguments[0], str | Path) else []
        raise OSError(inside.errno, os.strerror(inside.errno), *named)

    return action


def _rename(inside: Inside) -> None:
    _at_call(os, "replace", inside, _fails(inside))


def _fsync(inside: Inside) -> None:
    _at_call(os, "fsync", inside, _fails(inside))


def _save(inside: Inside) -> None:
    """The disk is full in a save: no file may grow beyond some size, and the kernel refuses the write itself."""
    from vold.trainer import checkpoint

    def limited(write, *arguments, **keywords):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (random.Random(inside.number).randrange(1000, 200_000), before[1]))
        try:
            return write(*arguments, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    _at_call(checkpoint, "write_pieces", inside, limited)


def _append(inside: Inside) -> None:
    """The disk is full in the middle of a line of metrics.jsonl or another log."""
    from vold.run import run_dir

    def torn(append, path, rows):
        append(path, rows)
        if path.stat().st_size > 10:
            os.truncate(path, path.stat().st_size - 7)
        raise OSError(inside.errno, os.strerror(inside.errno), str(path))

    _at_call(run_dir, "append_jsonl", inside, torn)


def _open(inside: Inside) -> None:
    _fails_below(inside, builtins, "open")
    io.open = builtins.open  # pathlib's


def _listed(inside: Inside) -> None:
    _fails_below(inside, os, "scandir")


def _removed(inside: Inside) -> None:
    _fails_below(inside, os, "unlink")


def _made(inside: Inside) -> None:
    _fails_below(inside, os, "mkdir")


def _fails_below(inside: Inside, owner: object, name: str) -> None:
    """The `number`-th call for a path of the campaign's folder fails; others are not the run's files."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        if arguments and str(arguments[0]).startswith(inside.below):
            calls[0] += 1
            if calls[0] == inside.number:
                raise OSError(inside.errno, os.strerror(inside.errno), str(arguments[0]))
        return original(*arguments, **keywords)

    setattr(owner, name, counted)


PLACES = {
    "rename": _rename,
    "fsync": _fsync,
    "save": _save,
    "append": _append,
    "open": _open,
    "list": _listed,
    "remove": _removed,
    "make": _made,
}
