"""What an experiment is, before it runs: a part's YAML, and the trainings that follow from it.

A part compares arms (methods, with their overrides) under conditions (worlds, starts, lengths) and names its
comparisons before anything has run. Every choice is made on validation problems: each arm's learning rate by a sweep on
seeds that do not count, which goes on until the best rate has a worse one on both sides. The test problems are answered
once, by the final model of each counted run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from vold.config import load_config
from vold.config.schema.base import Strict
from vold.miniature.worlds import Extra, WorldKeys

PARTS = Path(str(files("vold.miniature") / "science" / "parts"))
SEEDS = tuple(range(8))
START = "start"
"""The arm of the model that the others start from."""


class Start(Strict):
    """The SFT run that a training starts from; it is shared by all parts that ask for the same.

    steps       of SFT; 0 starts from the base itself
    traces      rows of the teacher's traces; None takes all
    style       of the traces: the teacher's, or another one (the misaligned start)
    questions   number of questions that it also learns to write, as self-play needs
    """

    steps: int = Field(default=100, ge=0)
    traces: int | None = Field(default=120, ge=1)
    style: Literal["teacher", "other"] = "teacher"
    questions: int = Field(default=0, ge=0)


class ProblemSet(Strict):
    """Problems by which choices are made and final models are judged; $placeholders as in `Part`."""

    validation: str
    test: str
    layout: str
    limit: int | None = None


class Condition(Strict):
    """A point of a claim's curve.

    x           its place on the axis of the figure; conditions without one are drawn side by side
    world       None: none is made, and the overrides name all paths
    start       a checkpoint's path: all seeds begin there; None: the checkpoint that the overrides name, untested
    overrides   laid over the part's, before the arm's
    arms        the arms that run here; None means all
    """

    world: WorldKeys | None = WorldKeys()
    start: Start | str | None = Start()
    steps: int | None = None
    x: float | None = None
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] | None = None

    @property
    def trained_start(self) -> Start | None:
        """The SFT that comes first; None where there is none."""
        return self.start if isinstance(self.start, Start) and self.start.steps else None


class Arm(Strict):
    """A method. `rates`: where its sweep begins, ascending; a single one is taken as it is."""

    overrides: tuple[str, ...] = ()
    rates: tuple[float, ...] = Field(min_length=1)


class Sweep(Strict):
    """Under which conditions the arms' rates are tried, with which seeds, and how many rates at most.

    A condition that is not among them takes the rates of the first.
    """

    conditions: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = (100, 101)
    most: int = 6


class Comparison(Strict):
    """`new` - `old`, in points of each measure, under each of the conditions (None: all in which both arms run).

    against   the condition of `old`, where it is not that of `new`
    """

    new: str
    old: str
    measures: tuple[str, ...]
    conditions: tuple[str, ...] | None = None
    against: str | None = None


class Cell(NamedTuple):
    """An arm under a condition."""

    condition: str
    arm: str


class Contrast(NamedTuple):
    """One number that a part promises to report, with its verdict."""

    new: str
    old: str
    measure: str
    condition: str
    against: str


class Part(Strict):
    """One experiment.

    overrides and paths of problems may hold $teacher, $base, $train, $val_text, $test_image …, $solver, $pictures,
    $vision_teacher: paths of the condition's world; $start, the model of the run's seed; $configs, the miniature's.

    claim          what is tested, and where it was published
    config         below vold/miniature/configs, or a path
    eval_config    of the test, likewise
    temperature    of all answers that are judged; None: that of the configs
    curve_every    steps between validations of a run that counts, for curves; 0: none; self-play's are 1
    sets           measure name -> its problems
    x_marks        places on the figure's axis that have a name, as published values
    logged         metrics, means over steps, that are reported beside the accuracies; self-play has its bank's, too
    extras         of its worlds: solver, or pictures with small digits and a vision teacher
    seconds        CPU seconds that a step is expected to take, before one was measured
    """

    claim: str
    command: Literal["rl", "selfplay"] = "rl"
    config: str = "rl.yaml"
    eval_config: str = "eval.yaml"
    overrides: tuple[str, ...] = ()
    steps: int
    seeds: tuple[int, ...] = SEEDS
    sets: dict[str, ProblemSet]
    conditions: dict[str, Condition]
    x_label: str = ""
    x_marks: dict[str, float] = Field(default={})
    arms: dict[str, Arm]
    sweep: Sweep
    comparisons: tuple[Comparison, ...]
    logged: tuple[str, ...] = ()
    curve_every: int = 0
    temperature: float | None = None
    extras: tuple[Extra, ...] = ()
    seconds: float = 1.0

    @classmethod
    def load(cls, path: Path) -> Part:
        """The part that a file describes. Raises ValueError with one line where it does not fit."""
        return load_config(cls, path)

    @model_validator(mode="after")
    def _names_exist(self) -> Part:
        arms = {name for comparison in self.comparisons for name in (comparison.new, comparison.old)} - {START}
        arms |= {name for condition in self.conditions.values() for name in condition.arms or ()}
        conditions = {name for comparison in self.comparisons for name in comparison.conditions or ()}
        conditions |= {*self.sweep.conditions}
        conditions |= {comparison.against for comparison in self.comparisons if comparison.against}
        measures = {measure for comparison in self.comparisons for measure in comparison.measures}
        for kind, named, known in (
            ("arm", arms, self.arms),
            ("condition", conditions, self.conditions),
            ("measure", measures, self.sets),
        ):
            if unknown := sorted(named - known.keys()):
                raise ValueError(f"{kind} {', '.join(unknown)} is not defined; there are {', '.join(known)}")
        for one in self.comparisons:
            for condition in one.conditions or ():
                for arm, where in ((one.new, condition), (one.old, one.against or condition)):
                    if not self._runs(arm, where):
                        raise ValueError(f"{one.new} - {one.old} under {condition}: {arm} does not run under {where}")
        if overlap := sorted({*self.seeds} & {*self.sweep.seeds}):
            raise ValueError(f"seeds {overlap} are both swept and counted")
        return self

    @cached_property
    def family(self) -> tuple[Contrast, ...]:
        """Every comparison on each measure under each of its conditions: the family that Holm's correction is for."""
        return tuple(
            Contrast(one.new, one.old, measure, condition, one.against or condition)
            for one in self.comparisons
            for measure in one.measures
            for condition in one.conditions or self.conditions
            if self._runs(one.new, condition) and self._runs(one.old, one.against or condition)
        )

    def _runs(self, arm: str, condition: str) -> bool:
        one = self.conditions[condition]
        return arm in self.arms_of(one) or (arm == START and one.start is not None)

    def trained_starts(self) -> list[tuple[WorldKeys, Start, int]]:
        """World, SFT and seed of every start that has to be trained, seed by seed."""
        return list(
            dict.fromkeys(
                (one.world, one.trained_start, seed)
                for seed in (*self.sweep.seeds, *self.seeds)
                for one in self.conditions.values()
                if one.world and one.trained_start
            )
        )

    def arms_of(self, condition: Condition) -> tuple[str, ...]:
        """Names of the arms that run under a condition."""
        return condition.arms or tuple(self.arms)

    def steps_of(self, condition: str) -> int:
        """Length of a training under a condition."""
        return self.conditions[condition].steps or self.steps

    def cells(self) -> list[Cell]:
        """Every arm under every condition in which it runs."""
        return [Cell(name, arm) for name, condition in self.conditions.items() for arm in self.arms_of(condition)]

    def swept_at(self, cell: Cell) -> Cell:
        """The cell whose sweep gives this one its rate."""
        if cell.condition in self.sweep.conditions:
            return cell
        offered = (Cell(condition, cell.arm) for condition in (*self.sweep.conditions, *self.conditions))
        return next(one for one in offered if self._runs(one.arm, one.condition))

    def sweeps(self) -> list[Cell]:
        """The cells that have a sweep."""
        return list(dict.fromkeys(self.swept_at(cell) for cell in self.cells() if len(self.arms[cell.arm].rates) > 1))

    def counted(self, rates: Mapping[Cell, float]) -> list[Training]:
        """All runs that count, by condition and then by seed, so that an interrupted part has whole pairs."""
        return [
            Training(name, arm, seed, rates[Cell(name, arm)], swept=False)
            for name, condition in self.conditions.items()
            for seed in self.seeds
            for arm in self.arms_of(condition)
        ]

    def tried(self, cell: Cell, rates: Sequence[float]) -> list[Training]:
        """The runs of a cell's sweep at these rates."""
        return [Training(*cell, seed, rate, swept=True) for rate in rates for seed in self.sweep.seeds]


@dataclass(frozen=True)
class Training:
    """One run of a part: a cell, a seed, a learning rate. A swept one is judged on validation problems alone."""

    condition: str
    arm: str
    seed: int
    rate: float
    swept: bool

    @property
    def name(self) -> str:
        """Its folder and file, below the part's."""
        return f"{self.condition}/{self.arm}/{'sweep' if self.swept else 'seed'}{self.seed}-lr{self.rate:g}"


def part_path(name: str) -> Path:
    """The file of a part, by its name here or its path; ValueError for an unknown one."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PARTS / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"PART: {name!r} is unknown; one of {', '.join(part_names())}, or a file")
    return path


def part_names() -> list[str]:
    """Names of the parts that are here."""
    return sorted(path.stem for path in PARTS.glob("*.yaml"))


def part_folder(root: Path, path: Path) -> Path:
    """Where a part's results lie."""
    return root / "science" / path.stem


def result_path(root: Path, path: Path, training: Training) -> Path:
    """The JSON of a run of the part at `path`; it is there when the run is complete."""
    return part_folder(root, path) / f"{training.name}.json"


def next_rates(scores: dict[float, float], most: int) -> tuple[float, ...]:
    """Rates to try next, given each tried rate's validation accuracy (nan where training failed).

    While the best rate is the lowest or highest one, its neighbour outside, by the ratio of the two rates there. Empty
    where the optimum is inside, only one rate is offered or `most` have been tried.
    """
    rates = sorted(scores)
    if len(rates) < 2 or len(rates) >= most:
        return ()
    best = best_rate(scores)
    neighbours = {rates[0]: _rounded(rates[0] ** 2 / rates[1]), rates[-1]: _rounded(rates[-1] ** 2 / rates[-2])}
    return tuple(rate for edge, rate in neighbours.items() if edge == best and rate not in scores)


def best_rate(scores: dict[float, float]) -> float:
    """The rate of the highest validation accuracy; the lower of equals; failed ones (nan) last."""
    return max(sorted(scores), key=lambda rate: (scores[rate] == scores[rate], scores[rate]))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
