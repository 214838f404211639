"""`python -m vold.miniature second-act`: RL on image problems after VOLD on text (paper section 7.5), three seeds.

Two questions. Does RL on image problems gain from VOLD on text before it? GRPO from the base, from SFT and from VOLD.
And, where one digit of each picture is drawn small and the teacher is a vision-language model, does it pay to distil
most where the teacher's log-probs depend on the detail? VA-OPD against the same loss without its weights (OPD), from
VOLD, with as many rollouts. A seed draws its own SFT and VOLD, problems and samples; each arm's learning rate is the
best of two on validation problems with the first seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vold.io import log, write_atomically
from vold.miniature.data import write_pictures
from vold.miniature.demo import commit, eval_phase, read_evaluation, rl_phase, sft_phase, traces_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.measure import Checkpoint, load_image_items
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.miniature.pretrain import make_vision_teacher
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
    """One training.

    start              the model of the first act that it starts from
    problems           image | small, for training and for the choice of its learning rate
    visual_advantage   whether the distillation is weighted by it; None without a teacher
    """

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
class SecondActPaths:
    """Paths of the second act; the first act's lie below runs/reproduce."""

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
        second_act = kind == "small" or split == "train"
        return self.pictures / f"{split}_{kind}.jsonl" if second_act else self.world.image(split)


def run(root: Path = Path("runs"), *, parallel: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run all arms; write report.json, table.md and second-act.png below runs/second-act. Finished arms are kept."""
    started = time.perf_counter()
    paths = SecondActPaths(root, make_world(root / "miniature" / "seed0", seed=0))
    write_pictures(paths.pictures, seed=0)
    for group in _first_act(paths, seeds):
        run_phases(group, parallel=parallel)
    make_vision_teacher(paths.teacher, paths.world.base, seed=0)
    teacher = _teacher_accuracy(paths)
    log.info(f"the vision-language teacher on test problems: {teacher}")
    first, *others = seeds
    run_phases([_phase(paths, arm, rate, first) for arm in ARMS for rate in arm.rates], parallel=parallel)
    scores = {arm.name: {rate: _validation(paths, arm, rate, first) for rate in arm.rates} for arm in ARMS}
    rates = {name: max(by_rate, key=lambda rate: by_rate[rate]) for name, by_rate in scores.items()}
    run_phases([_phase(paths, arm, rates[arm.name], seed) for seed in others for arm in ARMS], parallel=parallel)
    models = [("base", paths.world.base, first), *(model for seed in seeds for model in _models(paths, rates, seed))]
    run_phases([_evaluation(paths, *model) for model in models], parallel=parallel)
    rows = [{"seed": seed, "arm": name} | _accuracies(paths, name, seed) for name, _, seed in models]
    facts = {"rows": rows, "tried": scores, "teacher": teacher, "versions": versions(), "commit": commit()}
    _write(paths, rows, rates, facts | {"wall_seconds": time.perf_counter() - started})


def _first_act(paths: SecondActPaths, seeds: Sequence[int]) -> list[list[Phase]]:
    """Traces, SFT and VOLD, made here where they are missing."""
    reproduce, world = paths.root / "reproduce", paths.world
    traces = f"data.path={reproduce / 'traces' / 'traces'}"
    folders = [(paths.first_act(seed), (f"seed={seed}",)) for seed in seeds]
    return [
        [traces_phase(reproduce, world)],
        [sft_phase(folder, world, "sft", (*seeded, traces)) for folder, seeded in folders],
        [rl_phase(folder, world, "vold", overrides=seeded) for folder, seeded in folders],
    ]


def _phase(paths: SecondActPaths, arm: Arm, rate: str, seed: int) -> Phase:
    kind = arm.problems
    validation = f"{{{kind}: {{path: {paths.problems(kind, 'val')}, layout: geometry3k}}}}"
    settings = (
        f"student={paths.start(arm.start, seed)}",
        f"data.path={paths.problems(kind, 'train')}",
        f"evaluation.sets={validation}",
        f"optimizer.lr={rate}",
        f"seed={seed}",
    )
    if arm.visual_advantage is not None:
        advantage = f"objective.visual_advantage={str(arm.visual_advantage).lower()}"
        settings = (*settings, *VA_OPD, advantage, f"teacher={paths.teacher}")
    return Phase("rl", "images.yaml", paths.run_dir(arm, rate, seed), settings, STEPS)


def _validation(paths: SecondActPaths, arm: Arm, rate: str, seed: int) -> float:
    """Accuracy on validation problems after the last step."""
    return read_rows(paths.run_dir(arm, rate, seed) / "metrics.jsonl")[-1][f"accuracy_{arm.problems}"]


def _models(paths: SecondActPaths, rates: dict[str, str], seed: int) -> list[tuple[str, Path, int]]:
    """Name, checkpoint and seed of the models in the table, without the base, which is the same for all seeds."""
    starts = [(name, paths.start(name, seed), seed) for name in ("sft", "vold")]
    return starts + [(arm.name, paths.run_dir(arm, rates[arm.name], seed) / "model", seed) for arm in ARMS]


def _evaluation(paths: SecondActPaths, name: str, checkpoint: Path, seed: int) -> Phase:
    phase = eval_phase(paths.out / f"seed{seed}", paths.world, name, checkpoint)
    small = f"evaluation.sets.small={{path: {paths.problems('small', 'test')}, layout: geometry3k}}"
    return Phase(phase.verb, phase.config, phase.run_dir, (*phase.overrides, small))


def _accuracies(paths: SecondActPaths, name: str, seed: int) -> dict[str, float]:
    sets = read_evaluation(paths.out / f"seed{seed}", name)
    return {problems: numbers["accuracy"] for problems, numbers in sets.items()}


def _teacher_accuracy(paths: SecondActPaths) -> dict[str, float]:
    """Accuracy of the vision-language teacher on test problems, measured by transformers alone."""
    path = paths.out / "teacher.json"
    if not path.exists():
        teacher = Checkpoint(paths.teacher)
        kinds = {kind: load_image_items(paths.problems(kind, "test")) for kind in ("image", "small")}
        accuracy = {kind: teacher.measure(items).accuracy for kind, items in kinds.items()}
        write_atomically(path, json.dumps(accuracy) + "\n")
    return json.loads(path.read_text())


# -- the report ----------------------------------------------------------------------------------------------------


def _write(paths: SecondActPaths, rows: list[dict], rates: dict[str, str], facts: dict) -> None:
    differences = [_difference(rows, *pair) for pair in PAIRS]
    table = "\n\n".join(
        [
            seeds_table(rows),
            markdown(["paired over seeds, points", "difference"], differences),
            markdown(
                ["validation, first seed, %", "by learning rate"],
                [
                    [name, ", ".join(f"{100 * value:.1f} at {rate}" for rate, value in by_rate.items())]
                    for name, by_rate in facts["tried"].items()
                ],
            ),
        ]
    )
    write_atomically(paths.out / "report.json", json.dumps({**facts, "rates": rates}, indent=1) + "\n")
    write_atomically(paths.out / "table.md", table + "\n")
    seeds = sorted({row["seed"] for row in rows})
    runs = [
        read_run(paths.run_dir(arm, rates[arm.name], seed), f"seed{seed}/{arm.name}") for arm in ARMS for seed in seeds
    ]
    (paths.out / "second-act.png").write_bytes(curves(runs, FIGURE, fmt="png"))
    log.info(f"\n{table}\n\n{paths.out / 'second-act.png'}")


def _difference(rows: Sequence[dict], new: str, old: str, problems: str) -> list[str]:
    """Points of accuracy, mean ± standard error of the seeds' own differences."""
    accuracy = {(row["arm"], row["seed"]): row[problems] for row in rows}
    differences = [accuracy[new, seed] - accuracy[old, seed] for arm, seed in accuracy if arm == new]
    return [f"{new} - {old} on {problems}", str(Mean(tuple(differences)))]
