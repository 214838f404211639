"""`python -m vold.miniature second-act`: what pictures add after text (paper section 7.5), three seeds.

Two questions. Does RL on problems in pictures gain from VOLD on text before it? GRPO from the base, from SFT and from
VOLD. And, where one digit of each picture is drawn small and a teacher sees it, does it pay to distil most where that
teacher's opinion hangs on the detail? VA-OPD beside the same loss without its weights (OPD), from VOLD, with as many
rollouts. A seed draws its own SFT and VOLD, problems and samples; each arm's learning rate is the best of two on
validation problems with the first seed, whose run is that one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vold.miniature.data import write_pictures
from vold.miniature.demo import commit, eval_phase, phases, read_evaluation, rl_phase, sft_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.measure import Checkpoint, load_image_items
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.miniature.pretrain import make_seeing_teacher
from vold.report import curves, read_run, seeds_table
from vold.report.tables import Mean, markdown
from vold.run.run_dir import read_rows

SEEDS = (0, 1, 2)
GRPO_RATES, OPD_RATES = ("1e-4", "3e-4"), ("3e-4", "1e-3")  # GRPO does not survive 1e-3
STEPS = 40  # as in vold/miniature/configs/images.yaml
VA_OPD = (str(CONFIGS / "methods" / "va-opd.yaml"), "vision.train_merger=true")  # small digits look new
FIGURE = ("accuracy_image", "accuracy_small", "image_sensitivity")


@dataclass(frozen=True)
class Arm:
    """`start`: a model of the first act; `problems`: image | small, what it learns from and is chosen on;
    `visual_advantage`: of the distillation from the teacher that sees, None without a teacher."""

    name: str
    start: str
    problems: str
    visual_advantage: bool | None = None

    @property
    def rates(self) -> tuple[str, ...]:
        return GRPO_RATES if self.visual_advantage is None else OPD_RATES


ARMS = (
    Arm("base-grpo", "base", "image"),
    Arm("sft-grpo", "sft", "image"),
    Arm("vold-grpo", "vold", "image"),
    Arm("vold-opd", "vold", "small", visual_advantage=False),
    Arm("vold-va-opd", "vold", "small", visual_advantage=True),
)
PAIRS = (
    ("sft-grpo", "sft", "image"),
    ("vold-grpo", "vold", "image"),
    ("vold-grpo", "sft-grpo", "image"),
    ("vold-va-opd", "vold-opd", "small"),
)


@dataclass(frozen=True)
class _Places:
    """Where everything lies; the first act is that of `make reproduce`."""

    root: Path
    world: MiniatureWorld

    @property
    def out(self) -> Path:
        return self.root / "second-act"

    @property
    def pictures(self) -> Path:
        return self.out / "pictures"

    @property
    def teacher(self) -> Path:
        return self.out / "teacher"

    def first_act(self, seed: int) -> Path:
        return self.root / "reproduce" / f"seed{seed}"

    def start(self, name: str, seed: int) -> Path:
        return self.world.base if name == "base" else self.first_act(seed) / name / "model"

    def run_dir(self, arm: Arm, rate: str, seed: int) -> Path:
        return self.out / f"seed{seed}" / f"lr-{rate}" / arm.name

    def problems(self, kind: str, split: str) -> Path:
        own = kind == "small" or split == "train"
        return self.pictures / f"{split}_{kind}.jsonl" if own else self.world.image(split)


def run(root: Path = Path("runs"), *, side_by_side: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Writes report.json, table.md and second-act.png below runs/second-act; finished arms are kept."""
    started = time.perf_counter()
    places = _Places(root, make_world(root / "miniature" / "seed0", seed=0))
    write_pictures(places.pictures, seed=0)
    for group in _first_act(places, seeds):
        run_phases(group, side_by_side=side_by_side)
    make_seeing_teacher(places.teacher, places.world.base, seed=0)
    teacher = _teacher_accuracy(places)
    print(f"the seeing teacher on test problems: {teacher}", flush=True)
    first, *others = seeds
    run_phases([_phase(places, arm, rate, first) for arm in ARMS for rate in arm.rates], side_by_side=side_by_side)
    tried = {arm.name: {rate: _validated(places, arm, rate, first) for rate in arm.rates} for arm in ARMS}
    rates = {name: max(found, key=found.get) for name, found in tried.items()}
    rest = [_phase(places, arm, rates[arm.name], seed) for seed in others for arm in ARMS]
    run_phases(rest, side_by_side=side_by_side)
    models = [("base", places.world.base, first), *(model for seed in seeds for model in _models(places, rates, seed))]
    run_phases([_evaluation(places, *model) for model in models], side_by_side=side_by_side)
    rows = [{"seed": seed, "arm": name} | _accuracies(places, name, seed) for name, _, seed in models]
    facts = {"rows": rows, "tried": tried, "teacher": teacher, "versions": versions(), "commit": commit()}
    _write(places, rows, rates, facts | {"wall_seconds": time.perf_counter() - started})


def _first_act(places: _Places, seeds: Sequence[int]) -> list[list[Phase]]:
    """Traces, SFT and VOLD: the runs of `make reproduce`, made here where they are not there yet."""
    reproduce, world = places.root / "reproduce", places.world
    traces = f"data.path={reproduce / 'traces' / 'traces'}"
    folders = [(places.first_act(seed), (f"seed={seed}",)) for seed in seeds]
    return [
        phases(reproduce, world)[0],
        [sft_phase(folder, world, "sft", (*seeded, traces)) for folder, seeded in folders],
        [rl_phase(folder, world, "vold", overrides=seeded) for folder, seeded in folders],
    ]


def _phase(places: _Places, arm: Arm, rate: str, seed: int) -> Phase:
    kind = arm.problems
    validation = f"{{{kind}: {{path: {places.problems(kind, 'val')}, layout: geometry3k}}}}"
    settings = (
        f"student={places.start(arm.start, seed)}",
        f"data.path={places.problems(kind, 'train')}",
        f"evaluation.sets={validation}",
        f"optimizer.lr={rate}",
        f"seed={seed}",
    )
    if arm.visual_advantage is not None:
        advantage = f"objective.visual_advantage={str(arm.visual_advantage).lower()}"
        settings = (*settings, *VA_OPD, advantage, f"teacher={places.teacher}")
    return Phase("rl", "images.yaml", places.run_dir(arm, rate, seed), settings, STEPS)


def _validated(places: _Places, arm: Arm, rate: str, seed: int) -> float:
    """Accuracy on validation problems after the last step."""
    return read_rows(places.run_dir(arm, rate, seed) / "metrics.jsonl")[-1][f"accuracy_{arm.problems}"]


def _models(places: _Places, rates: dict[str, str], seed: int) -> list[tuple[str, Path, int]]:
    """Name, checkpoint and seed of what the table compares; the base is the same for all seeds."""
    starts = [(name, places.start(name, seed), seed) for name in ("sft", "vold")]
    return starts + [(arm.name, places.run_dir(arm, rates[arm.name], seed) / "model", seed) for arm in ARMS]


def _evaluation(places: _Places, name: str, checkpoint: Path, seed: int) -> Phase:
    phase = eval_phase(places.out / f"seed{seed}", places.world, name, checkpoint)
    small = f"evaluation.sets.small={{path: {places.problems('small', 'test')}, layout: geometry3k}}"
    return Phase(phase.verb, phase.config, phase.run_dir, (*phase.overrides, small))


def _accuracies(places: _Places, name: str, seed: int) -> dict[str, float]:
    found = read_evaluation(places.out / f"seed{seed}", name)
    return {problems: numbers["accuracy"] for problems, numbers in found.items()}


def _teacher_accuracy(places: _Places) -> dict[str, float]:
    """On test problems, measured by transformers alone."""
    path = places.out / "teacher.json"
    if not path.exists():
        teacher = Checkpoint(places.teacher)
        kinds = {kind: load_image_items(places.problems(kind, "test")) for kind in ("image", "small")}
        path.write_text(json.dumps({kind: teacher.measure(items).accuracy for kind, items in kinds.items()}) + "\n")
    return json.loads(path.read_text())


# -- the report ----------------------------------------------------------------------------------------------------


def _write(places: _Places, rows: list[dict], rates: dict[str, str], facts: dict) -> None:
    differences = [_difference(rows, *pair) for pair in PAIRS]
    table = "\n\n".join(
        [
            seeds_table(rows),
            markdown(["paired over seeds, points", "difference"], differences),
            markdown(
                ["validation, first seed, %", "by learning rate"],
                [
                    [name, ", ".join(f"{100 * value:.1f} at {rate}" for rate, value in found.items())]
                    for name, found in facts["tried"].items()
                ],
            ),
        ]
    )
    (places.out / "report.json").write_text(json.dumps({**facts, "rates": rates}, indent=1) + "\n")
    (places.out / "table.md").write_text(table + "\n")
    seeds = sorted({row["seed"] for row in rows})
    runs = [
        read_run(places.run_dir(arm, rates[arm.name], seed), f"seed{seed}/{arm.name}") for arm in ARMS for seed in seeds
    ]
    (places.out / "second-act.png").write_bytes(curves(runs, FIGURE, fmt="png"))
    print(f"\n{table}\n\n{places.out / 'second-act.png'}")


def _difference(rows: Sequence[dict], new: str, old: str, problems: str) -> list[str]:
    """Points of accuracy, mean ± standard error of the seeds' own differences."""
    accuracy = {(row["arm"], row["seed"]): row[problems] for row in rows}
    differences = [accuracy[new, seed] - accuracy[old, seed] for arm, seed in accuracy if arm == new]
    return [f"{new} - {old} on {problems}", str(Mean(tuple(differences)))]
