"""A campaign of faults against small runs, each compared with the uninterrupted run.

    python -m benchmarks.chaos --hours 1 --seed 0        writes benchmarks/results/chaos.md and prints the table
    python -m benchmarks.chaos --minutes 3 --seed 0 --out runs/chaos.md    what CI runs

A try is a run of a few steps (SFT or RL, lag 0 or 1, saves in the background or not, on one or two ranks) that suffers
one or two faults at random moments and is resumed after each, at times elsewhere or at another layout. It survives when
it then ends with the uninterrupted run's weights, moments, random state, metrics, prompts and samples, bit for bit; at
another layout, with its rows and, within rounding, its weights. A run at lag 1 is compared with one that was stopped in
order after the same steps, since a resumed run samples again what was under way. Everything else is lost: other
numbers, a step twice or never, a traceback, a process that does not end, a refusal that names no file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from vold.io import log, write_atomically
from vold.miniature.data import DataSizes, write_data
from vold.run.run_dir import read_rows

from .chaos_ranks import ERRNOS, Inside, Launch, wait_until
from .harness import environment

CONFIGS = Path(__file__).parents[1] / "vold" / "miniature" / "configs"
TIMES = ("seconds", "cpu_seconds", "tokens_per_second", "prompts_per_second", "peak_memory", "memory_gib", "rollout_t")
COMMON = ["save_every=2", "keep_checkpoints=3", "optimizer.warmup_steps=1", "timeout_seconds=40", "loggers=[]"]
SFT = ["steps=8", "batch_size=6", "evaluation={}", "pair_with=null", "data.layout=prompt-response"]
RL = [
    "steps=6",
    "prompts_per_step=4",
    "rollout.responses_per_prompt=3",
    "rollout.max_new_tokens=12",
    "evaluation={}",
    "objective.target_kl=0.01",
    "rollout.curriculum={lowest: 0.1, highest: 0.9}",
]
STEERED = ["objective={preset: dcpo, beta: 0.3}", "rollout.lag=1", "minibatches=2"]
KINDS = {"sft": SFT, "rl": RL, "rl-lag1": [*RL[:-2], *STEERED]}
LIMIT = 150.0
"""Seconds after which a launch hangs."""


class Lost(Exception):
    """The run did not survive; the message says how."""


@dataclass(frozen=True)
class Variant:
    """kind: of KINDS; world: ranks at the start."""

    kind: str
    world: int
    background: bool

    @property
    def verb(self) -> str:
        return self.kind.partition("-")[0]


@dataclass
class World:
    """A folder with models, data, and the uninterrupted runs made so far."""

    root: Path
    references: dict[tuple, Path] = field(default_factory=dict)
    launches: int = 0

    @classmethod
    def make(cls, root: Path) -> World:
        from vold.miniature import models

        for name, config in (("student", models.base_config()), ("teacher", models.teacher_config())):
            models.save_checkpoint(models.new_model(config, seed=0), root / name)
        write_data(root / "data", 0, DataSizes(train=24, traces_prompts=4, traces_other=12, val=2, test=2))
        return cls(root)

    def arguments(self, variant: Variant, run_dir: Path, *extra: str) -> list[str]:
        data = self.root / "data" / ("train.json" if variant.verb == "rl" else "traces_other.jsonl")
        models = [f"student={self.root / 'student'}"]
        models += [f"teacher={self.root / 'teacher'}"] if variant.verb == "rl" else []
        given = [*models, f"data.path={data}", f"run_dir={run_dir}", f"save_async={str(variant.background).lower()}"]
        return [variant.verb, str(CONFIGS / f"{variant.verb}.yaml"), *COMMON, *KINDS[variant.kind], *given, *extra]

    def launch(self, variant: Variant, run_dir: Path, *extra: str, world: int = 0, inside: Inside | None = None):
        self.launches += 1
        folder = self.root / "launches" / f"{self.launches:05d}"
        return Launch(self.arguments(variant, run_dir, *extra), world or variant.world, folder, inside)

    def finish(self, variant: Variant, run_dir: Path, *extra: str, world: int = 0) -> None:
        """Run to the end, undisturbed. Raises Lost where it does not get there."""
        launch = self.launch(variant, run_dir, *extra, world=world)
        if not launch.wait(LIMIT):
            raise Lost("hangs: " + launch.output()[-500:])
        if launch.codes != [0] * (world or variant.world):
            raise Lost(f"exit codes {launch.codes}: {launch.output()[-800:]}")

    def reference(self, variant: Variant, stops: tuple[int, ...]) -> Path:
        """The uninterrupted run; at lag 1 one that was stopped in order after each of `stops`."""
        plain = Variant(variant.kind, variant.world, background=False)
        stops = stops[-1 - stops[::-1].index(0) :][1:] if 0 in stops else stops  # what was before a new start is gone
        key = (plain, stops)
        if key not in self.references:
            run_dir = self.root / "references" / "-".join(map(str, (variant.kind, variant.world, *stops)))
            keep = ["save_every=1", "keep_checkpoints=99"]
            if stops:
                shutil.copytree(self.reference(variant, stops[:-1]), run_dir)
                shutil.rmtree(run_dir / "model")
                (run_dir / "checkpoints" / "latest").write_text(f"step-{stops[-1]:06d}\n")
                for path in (run_dir / "checkpoints").glob("step-*"):
                    if int(path.name[5:]) > stops[-1]:
                        shutil.rmtree(path)
            self.finish(plain, run_dir, *keep, *(["--resume"] if stops else []))
            self.references[key] = run_dir
        return self.references[key]


# -- what is the same ----------------------------------------------------------------------------------------------


def compare(found: Path, expected: Path, *, exact: bool, unchecked: tuple[str, ...] = ()) -> None:
    """Raise Lost with the first difference of two finished runs. unchecked: logs that a warning has named."""
    for name in ("metrics.jsonl", "prompts.jsonl", "samples.jsonl"):
        if name in unchecked or not (expected / name).exists():
            continue
        one, other = (_timeless(read_rows(path / name)) for path in (found, expected))
        if [row["step"] for row in one] != [row["step"] for row in other]:
            raise Lost(f"{name}: steps {[row['step'] for row in one]}")
        if exact and one != other:
            differing = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
            keys = [key for key in differing[1] if differing[0].get(key) != differing[1][key]]
            raise Lost(f"{name}: step {differing[0]['step']} differs in {keys[:5]}")
    last = max((found / "checkpoints").glob("step-*")).name
    pairs = [(found / "model", expected / "model")]
    pairs += [(found / "checkpoints" / last, expected / "checkpoints" / last)] if exact else []
    for one, other in pairs:
        for path in sorted(other.glob("*.safetensors")):
            left, right = load_file(one / path.name), load_file(path)
            same = torch.equal if exact else (lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=2e-4))
            if left.keys() != right.keys() or not all(same(left[name], right[name]) for name in right):
                raise Lost(f"{one.name}/{path.name} differs")


def _timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


# -- one try -------------------------------------------------------------------------------------------------------


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


def _inside(where: str) -> Callable[[Try], None]:
    def fault(run: Try) -> None:
        most = {"rename": 40, "fsync": 20, "save": 2, "append": 12}[where]
        rank = 0 if where == "append" else run.rng.randrange(run.variant.world)
        inside = Inside(rank, where, run.rng.randrange(1, most + 1), run.rng.choice(ERRNOS))
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


FLIPPED = ("checkpoint", "latest", "config.yaml", "metrics.jsonl", "prompts.jsonl", "samples.jsonl", "lock.json")


def flipped(run: Try) -> None:
    """Killed after a save; a random bit of a file that is read on resume is flipped. Where the run refuses, the line
    must name the file; then its advice is followed."""
    launch = run.go()
    wait_until(lambda: run.saved() >= 2 or launch.codes is not None, LIMIT)
    time.sleep(run.rng.random())
    launch.signal([launch.launcher.pid, *launch.pids], KILL)
    launch.wait(LIMIT)
    kind = run.rng.choice(FLIPPED)
    checkpoints = run.run_dir / "checkpoints"
    step = checkpoints / f"step-{run.saved():06d}"
    single = checkpoints / kind if kind == "latest" else run.run_dir / kind
    files = sorted(step.iterdir()) if kind == "checkpoint" else [single]
    path = run.rng.choice(files)
    if not path.exists() or not path.stat().st_size:
        return
    original = path.read_bytes()
    content = bytearray(original)
    content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
    path.write_bytes(content)
    log.info(f"    flipped a bit of {path.relative_to(run.run_dir)}")
    pointed = (checkpoints / "latest").read_bytes().decode(errors="replace")
    launch = run.world.launch(run.variant, run.run_dir, "--resume")
    if not launch.wait(LIMIT):
        raise Lost("hangs: " + launch.output()[-500:])
    output = launch.output()
    if "Traceback" in output:
        raise Lost(f"{path.name}: traceback: {output[-800:]}")
    if {*(launch.codes or [1])} == {0}:
        run.stops.append(int(pointed[5:]))
        run.unchecked = tuple(name for name in FLIPPED if f"{name}: " in output)
        return
    if path.name not in output and step.name not in output:
        raise Lost(f"{path.name}: the refusal does not name it: {output[-500:]}")
    if kind != "checkpoint":
        path.write_bytes(original)
        return
    others = sorted(other for other in checkpoints.glob("step-*") if other != step)
    if others:
        (checkpoints / "latest").write_text(others[-1].name + "\n")
    else:
        path.write_bytes(original)


FLIP = "bit flip in a file read on resume"
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
    "killed, directory moved": moved,
    "killed, other layout on resume": elsewhere,
    "--resume beside the living run": second_writer,
    FLIP: flipped,
}
ALONE = {"killed, other layout on resume"}


def attempt(world: World, fault: str, rng: random.Random, number: int) -> None:
    """One try with `fault`, and in a third of them another before. Raises Lost."""
    kind = rng.choice(["sft", "sft", "rl", "rl-lag1"])
    if fault in ALONE:
        kind = "sft"  # at another layout sampled tokens may differ by rounding
    variant = Variant(kind, rng.choice([1, 2]) if fault != "SIGKILL of one rank" else 2, rng.random() < 0.5)
    run = Try(world, variant, rng, world.root / "runs" / f"{number:05d}")
    before = [rng.choice([name for name in FAULTS if name not in ALONE])] if rng.random() < 0.33 else []
    log.info(f"{number:4d} {fault}{' after ' + before[0] if before else ''}: {variant}")
    for name in (*before, fault):
        if not (run.run_dir / "model").exists():
            FAULTS[name](run)
    run.finish()
    shutil.rmtree(run.run_dir)


def campaign(seconds: float, seed: int, report: Callable[[dict[str, list[int]], list[str]], None]) -> list[str]:
    """Tries for so long, every fault in turn; after each, report(fault -> [tries, survived], what was lost). Returns
    what was lost."""
    root = Path(tempfile.mkdtemp(prefix="vold-chaos-"))
    world, rng = World.make(root), random.Random(seed)
    counts, lost = {fault: [0, 0] for fault in FAULTS}, []
    started, number = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        order = rng.sample([*FAULTS, FLIP, FLIP], len(FAULTS) + 2)  # many files to flip
        for fault in order:
            if time.monotonic() - started >= seconds:
                break
            number += 1
            counts[fault][0] += 1
            try:
                attempt(world, fault, random.Random(seed * 1_000_003 + number), number)
                counts[fault][1] += 1
            except Exception as error:  # the campaign's own mistakes are no survivals either
                lost.append(f"try {number}, {fault}: {error if isinstance(error, Lost) else repr(error)}")
                log.warning(f"{lost[-1]} (kept in {root})")
            report(counts, lost)
    if not lost:
        shutil.rmtree(root)
    return lost


def table(counts: dict[str, list[int]], lost: list[str], about: str) -> str:
    """A Markdown page: fault x tries x survived x lost."""
    lines = ["# Chaos", "", about, "", "| fault | tries | survived | lost |", "|:--|--:|--:|--:|"]
    lines += [f"| {fault} | {tries} | {survived} | {tries - survived} |" for fault, (tries, survived) in counts.items()]
    tries, survived = (sum(column) for column in zip(*counts.values(), strict=True))
    lines += [f"| **all** | **{tries}** | **{survived}** | **{tries - survived}** |", ""]
    return "\n".join([*lines, *(f"- {' '.join(line.split())[:300]}" for line in lost), *([""] if lost else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.md")
    options = parser.parse_args()
    seconds = 3600 * options.hours + 60 * options.minutes
    if seconds <= 0:
        parser.error("give --hours or --minutes")
    os.environ["OMP_NUM_THREADS"] = "1"
    from vold.io import configure_logging

    configure_logging()
    about = f"`python -m benchmarks.chaos`, seed {options.seed}"
    about += "".join(f"; {name} {value}" for name, value in environment(torch.device("cpu"), 1).items())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report(counts: dict[str, list[int]], lost: list[str]) -> None:
        minutes = (time.monotonic() - started) / 60
        write_atomically(options.out, table(counts, lost, f"{about}; {minutes:.0f} minutes."))

    lost = campaign(seconds, options.seed, report)
    log.info(options.out.read_text())
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
