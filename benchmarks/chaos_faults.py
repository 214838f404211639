"""The faults of the chaos campaign: what befalls a run, and what must hold right after."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vold.io import log

from .chaos_ranks import ERRNOS, Inside, Launch, wait_until
from .chaos_world import LIMIT, Lost, Variant, World, compare


@dataclass
class Try:
    """A run that faults befall. `stops`: the steps that it was resumed after, 0 for the start."""

    world: World
    variant: Variant
    rng: random.Random
    run_dir: Path
    stops: list[int] = field(default_factory=list)
    started: bool = False
    unchecked: tuple[str, ...] = ()
    other_layout: bool = False

    def go(self, *extra: str, inside: Inside | None = None, world: int = 0) -> Launch:
        """Start the run or resume it after its latest checkpoint."""
        resume = (self.run_dir / "config.yaml").exists() and self.started
        if resume:
            self.stops.append(self.saved())
        self.started = True
        return self.world.launch(
            self.variant, self.run_dir, *(["--resume"] if resume else []), *extra, inside=inside, world=world
        )

    def saved(self) -> int:
        latest = self.run_dir / "checkpoints" / "latest"
        return int(latest.read_text()[5:]) if latest.exists() else 0

    def at_a_random_moment(self, launch: Launch) -> None:
        """Wait until a random step is under way, and for a random part of a step."""
        step = self.rng.randrange(8 if self.variant.verb == "sft" else 6)
        metrics = self.run_dir / "metrics.jsonl"

        def there() -> bool:
            if not step:
                return metrics.parent.exists()
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= step

        wait_until(lambda: there() or launch.codes is not None, LIMIT)
        time.sleep(self.rng.random() * (2.0 if step == 0 else 0.5))

    def end(self, launch: Launch, *codes: int) -> None:
        """The launch ends by itself, in order, with one of `codes` on each rank."""
        if not launch.wait(LIMIT):
            raise Lost("hangs: " + launch.output()[-500:])
        if "Traceback" in (output := launch.output()):
            raise Lost("traceback: " + output[-800:])
        if launch.codes is not None and not {*launch.codes} <= {0, *codes}:
            raise Lost(f"exit codes {launch.codes}: {output[-500:]}")

    def finish(self) -> None:
        """Resume until the end and compare."""
        if not (self.run_dir / "model").exists():
            world = self.variant.world
            if self.other_layout:
                world = 3 - world
            self.end(launch := self.go(world=world))
            if launch.codes != [0] * world:
                raise Lost(f"exit codes {launch.codes}: {launch.output()[-800:]}")
        exact = not self.other_layout
        stops = tuple(self.stops) if self.variant.kind == "rl-lag1" else ()
        compare(self.run_dir, self.world.reference(self.variant, stops), exact=exact, unchecked=self.unchecked)


KILL, TERM, HUP, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def killed(run: Try) -> None:
    launch = run.go()
    run.at_a_random_moment(launch)
    launch.signal([launch.launcher.pid, *launch.pids], KILL)
    run.end(launch, -9)


def one_rank_killed(run: Try) -> None:
    launch = run.go()
    run.at_a_random_moment(launch)
    launch.signal([run.rng.choice(launch.pids)], KILL)
    run.end(launch, -9, 1, 143, -15)


def launcher_killed(run: Try) -> None:
    launch = run.go()
    run.at_a_random_moment(launch)
    launch.signal([launch.launcher.pid], KILL)
    run.end(launch)


def _asked(number: int, again: bool = False) -> Callable[[Try], None]:
    def fault(run: Try) -> None:
        launch = run.go()
        run.at_a_random_moment(launch)
        launch.signal([launch.launcher.pid], number)
        if again:  # the launcher and the scheduler each send one
            time.sleep(run.rng.random() * 0.3)
            launch.signal(launch.pids, number)
        run.end(launch, 128 + number, -number, 1)

    return fault


MOST_CALLS = {"rename": 40, "fsync": 20, "save": 2, "append": 12, "open": 120, "list": 40, "remove": 20, "make": 12}
"""About how often a run of a few steps does so."""


def _inside(where: str) -> Callable[[Try], None]:
    def fault(run: Try) -> None:
        most = MOST_CALLS[where]
        rank = 0 if where == "append" else run.rng.randrange(run.variant.world)
        number, code = run.rng.randrange(1, most + 1), run.rng.choice(ERRNOS)
        inside = Inside(rank, where, number, code, below=str(run.world.root))
        launch = run.go(inside=inside)
        run.end(launch, 2, 1, 143, -15)
        lines = launch.output().splitlines()
        if any(launch.codes or []) and not any(line.startswith("vold") for line in lines):
            raise Lost("ends without a word: " + launch.output()[-500:])

    return fault


def moved(run: Try) -> None:
    killed(run)
    new = run.run_dir.with_name(run.run_dir.name + "-moved")
    if run.run_dir.exists():
        shutil.move(run.run_dir, new)
        run.run_dir = new


def elsewhere(run: Try) -> None:
    killed(run)
    run.other_layout = True


def second_writer(run: Try) -> None:
    launch = run.go()
    run.at_a_random_moment(launch)
    if not wait_until(lambda: (run.run_dir / "lock.json").exists() or launch.codes is not None, LIMIT):
        raise Lost("no lock")
    other = run.world.launch(run.variant, run.run_dir, "--resume")
    other.wait(LIMIT)
    if launch.codes is None and not ("is in use by" in other.output() or "holds no run" in other.output()):
        raise Lost(f"a second writer was let in: {other.codes} {other.output()[-500:]}")
    run.end(launch)


LOGS = ("metrics.jsonl", "prompts.jsonl", "samples.jsonl", "timeline.jsonl")


def _flip(kind: str) -> Callable[[Try], None]:
    """Killed after a save; a random bit of a file that is read on resume is flipped. Where the run refuses, the line
    must name the file; then its advice is followed. Files that decide about numbers must be refused."""

    def fault(run: Try) -> None:
        launch = run.go()
        wait_until(lambda: run.saved() >= 2 or launch.codes is not None, LIMIT)
        time.sleep(run.rng.random())
        launch.signal([launch.launcher.pid, *launch.pids], KILL)
        launch.wait(LIMIT)
        path = run.rng.choice(_files(run, kind))
        if not path.exists() or not path.stat().st_size:
            return
        original = path.read_bytes()
        content = bytearray(original)
        content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
        pointed = run.saved()
        path.write_bytes(content)
        log.info(f"    flipped a bit of {path}")
        try:
            is_refused = _is_refused(run, path, kind)
        finally:
            if kind == "inputs":  # of other runs too
                path.write_bytes(original)
        if not is_refused:
            run.stops.append(pointed)
        elif kind == "checkpoint":
            _use_another_checkpoint(run, path, original)
        else:
            path.write_bytes(original)

    return fault


def _files(run: Try, kind: str) -> list[Path]:
    """The files of a kind that are read on resume."""
    checkpoints = run.run_dir / "checkpoints"
    if kind == "checkpoint":
        return sorted((checkpoints / f"step-{run.saved():06d}").iterdir())
    if kind == "run":
        names = (*LOGS, "config.yaml", "inputs.jsonl", "lock.json", "checkpoints/latest")
        return [run.run_dir / name for name in names]
    return run.world.inputs(run.variant)


def _is_refused(run: Try, path: Path, kind: str) -> bool:
    """Resume. Raises Lost for a refusal that does not name the file, and for inputs that are not refused."""
    launch = run.world.launch(run.variant, run.run_dir, "--resume")
    if not launch.wait(LIMIT):
        raise Lost("hangs: " + launch.output()[-500:])
    output = launch.output()
    if "Traceback" in output:
        raise Lost(f"{path.name}: traceback: {output[-800:]}")
    if {*(launch.codes or [1])} != {0}:
        if path.name not in output and (kind == "run" or path.parent.name not in output):
            raise Lost(f"{path.name}: the refusal does not name it: {output[-500:]}")
        return True
    if kind == "inputs":
        raise Lost(f"{path.name}: the flip was not noticed")
    run.unchecked += tuple(name for name in LOGS if f"{name}: " in output)
    return False


def _use_another_checkpoint(run: Try, path: Path, original: bytes) -> None:
    checkpoints = run.run_dir / "checkpoints"
    others = sorted(other for other in checkpoints.glob("step-*") if other != path.parent)
    if others:
        (checkpoints / "latest").write_text(others[-1].name + "\n")
    else:
        path.write_bytes(original)


FLIPS = {
    "bit flip in a checkpoint": _flip("checkpoint"),
    "bit flip in a log or record of the run": _flip("run"),
    "bit flip in models or data": _flip("inputs"),
}
FAULTS: dict[str, Callable[[Try], None]] = {
    "SIGKILL of all": killed,
    "SIGKILL of one rank": one_rank_killed,
    "SIGKILL of the launcher alone": launcher_killed,
    "SIGTERM": _asked(TERM),
    "SIGTERM twice": _asked(TERM, again=True),
    "SIGHUP": _asked(HUP),
    "Ctrl-C, passed on": _asked(INT, again=True),
    "disk full in a save": _inside("save"),
    "a write to a log fails": _inside("append"),
    "a rename fails": _inside("rename"),
    "an fsync fails": _inside("fsync"),
    "opening a file fails": _inside("open"),
    "listing, removing or making one fails": lambda run: _inside(run.rng.choice(["list", "remove", "make"]))(run),
    "killed, directory moved": moved,
    "killed, other layout on resume": elsewhere,
    "--resume beside the living run": second_writer,
    **FLIPS,
}
ALONE = {"killed, other layout on resume"}
