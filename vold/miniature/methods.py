"""`make reproduce`, second half: every method of configs/methods in the miniature, at equal rollouts.

Each method starts from the same SFT students as GRPO and VOLD there, sees as many prompts and responses, and has a
learning-rate sweep of its own: at the first seed, judged on validation problems, text and images alike; the run that
won *is* that seed's run, and the other seeds take its rate. Only these are asked the test problems. A method that fails
or diverges is a row that says so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vold.miniature.demo import commit, eval_phase, phases, read_evaluation, rl_paths, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.miniature.reproduce import start_phases
from vold.report import seeds_errorbars
from vold.report.tables import SeedCell, cell, markdown
from vold.trainer.run_log import read_rows

SEEDS = (0, 1, 2)
STEPS = 40
START = "sft"
METHODS = CONFIGS.parent / "methods"
NOT_HERE = ("va-opd", "x-reasoner-sft")  # a teacher that sees; a first stage
RATES = {1: (1e-4, 3e-4, 6e-4), 4: (3e-5, 1e-4, 3e-4), 16: (1e-5, 3e-5, 1e-4)}  # by updates a step
STARTS = {"x-reasoner": "misaligned-sft"}  # traces in another style than the teacher's
# The config's beta, .3, is VOLD's in the miniature. KDRL's falls to a fifth of where it began, as published.
_KDRL = ("objective.beta_end=0.06", "objective.beta_step=0.006")
_OWN_BETA = ("objective.beta=null",)
SETTINGS = {
    "dapo": ("rollout.dynamic_sampling=null",),  # it draws more rollouts
    "kdrl": _KDRL,
    "kdrl-response": _KDRL,
    "kdrl-group": _KDRL,
    "opd": _OWN_BETA,
    "sdpo": _OWN_BETA,
    "srpo": _OWN_BETA,
}


@dataclass(frozen=True)
class Arm:
    """One method at one learning rate."""

    method: str
    rate: float

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.rate:.0e}"  # without a dot: it names files

    def phase(self, out: Path, world: MiniatureWorld, students: Path, seed: int) -> Phase:
        """Its run at a seed. students: the folder of that seed's SFT students."""
        overrides = (
            *rl_paths(world),
            str(METHODS / f"{self.method}.yaml"),
            *SETTINGS.get(self.method, ()),
            f"student={students / STARTS.get(self.method, START) / 'model'}",
            f"seed={seed}",
            f"steps={STEPS}",
            f"evaluation.every={STEPS}",
            f"optimizer.lr={self.rate}",
        )
        return Phase("rl", "rl.yaml", out / f"seed{seed}" / self.name, overrides, STEPS)


def methods() -> list[str]:
    """Those that a text-only teacher, or none, can train."""
    return [path.stem for path in sorted(METHODS.glob("*.yaml")) if path.stem not in NOT_HERE]


def sweep(method: str) -> list[Arm]:
    """A method's arms."""
    updates = yaml.safe_load((METHODS / f"{method}.yaml").read_text()).get("minibatches", 1)
    return [Arm(method, rate) for rate in RATES[updates]]


def run(root: Path = Path("runs"), *, side_by_side: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Writes report.json, table.md and methods.png below runs/methods, after each seed; finished runs are kept."""
    started = time.perf_counter()
    out, starts = root / "methods", root / "reproduce"
    world = make_world(root / "miniature" / "seed0", seed=0)
    students = {seed: starts / f"seed{seed}" for seed in seeds}
    run_phases(phases(starts, world)[0], side_by_side=1)
    run_phases(
        [p for seed in seeds for p in start_phases(starts, students[seed], world, seed)], side_by_side=side_by_side
    )
    arms = [arm for method in methods() for arm in sweep(method)]
    for place, seed in enumerate(seeds):
        trained = [(arm, arm.phase(out, world, students[seed], seed)) for arm in arms]
        run_phases([phase for _, phase in trained], side_by_side=side_by_side, keep_going=True)
        if place == 0:
            tried = {arm: validation(phase.run_dir) for arm, phase in trained if phase.finished}
            arms = [best for method in methods() if (best := winner(method, tried)) is not None]
        done = [(arm, phase.run_dir) for arm, phase in trained if arm in arms and phase.finished]
        evals = [eval_phase(students[seed], world, START, students[seed] / START / "model")]
        evals += [eval_phase(out / f"seed{seed}", world, arm.name, run_dir / "model") for arm, run_dir in done]
        run_phases(evals, side_by_side=side_by_side)
        _write(out, students, arms, tried, seeds[: place + 1], time.perf_counter() - started)


def validation(run_dir: Path) -> float:
    """Mean accuracy on text and image validation problems at the end of a run."""
    last = read_rows(run_dir / "metrics.jsonl")[-1]
    return (last["accuracy_text"] + last["accuracy_image"]) / 2


def winner(method: str, tried: dict[Arm, float]) -> Arm | None:
    """The arm of a method with the best validation accuracy, the lower rate of equals; None if none finished."""
    own = [arm for arm in sweep(method) if arm in tried]
    return max(own, key=lambda arm: tried[arm], default=None)


def cost(run_dir: Path) -> dict[str, float]:
    """Of a step, medians over the run: seconds without evaluation, the teacher's seconds, the response tokens whose
    distillation it was asked for."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return {
        "seconds": statistics.median(row["seconds"] - row.get("seconds_evaluate", 0.0) for row in rows),
        "teacher_seconds": statistics.median(row.get("seconds_teacher", 0.0) for row in rows),
        "teacher_tokens": statistics.median(row.get("kl_tokens", 0.0) for row in rows),
    }


# -- the report ----------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    students: dict[int, Path],
    arms: Sequence[Arm],
    tried: dict[Arm, float],
    seeds: Sequence[int],
    seconds: float,
) -> None:
    rows = [_row(START, None, seed, students[seed], START) for seed in seeds]
    for arm in arms:
        folders = [(seed, out / f"seed{seed}") for seed in seeds]
        rows += [
            _row(arm.method, arm.rate, seed, folder, arm.name) | cost(folder / arm.name)
            for seed, folder in folders
            if (folder / f"eval_{arm.name}").exists()
        ]
    rows.sort(key=lambda row: -_mean([r["text"] + r["image"] for r in rows if r["arm"] == row["arm"]]))
    failed = sorted(set(methods()) - {row["arm"] for row in rows})
    sweeps = [
        {"arm": arm.method, "rate": arm.rate, "validation": tried.get(arm)} for m in methods() for arm in sweep(m)
    ]
    facts = {"rows": rows, "failed": failed, "sweeps": sweeps, "steps": STEPS}
    facts |= {"versions": versions(), "commit": commit(), "wall_seconds": seconds}
    (out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    shown = [{key: row[key] for key in ("seed", "arm", "text", "image")} for row in rows]
    (out / "methods.png").write_bytes(seeds_errorbars(shown, fmt="png"))
    table = methods_table(rows, failed)
    (out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\n{out / 'methods.png'}", flush=True)


def _row(arm: str, rate: float | None, seed: int, folder: Path, name: str) -> dict:
    sets = read_evaluation(folder, name)
    return {"arm": arm, "rate": rate, "seed": seed, **{key: numbers["accuracy"] for key, numbers in sets.items()}}


def methods_table(rows: Sequence[dict], failed: Sequence[str]) -> str:
    """Markdown: mean ± standard error over seeds, and what a step costs. A rate at the edge of its sweep has a *."""
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        accuracies = [SeedCell(tuple(row[name] for row in own)) for name in ("text", "image")]
        costs = [
            f"{_mean([row[key] for row in own]):{form}}" if key in own[0] else "–"
            for key, form in (("seconds", ".2f"), ("teacher_tokens", ".0f"), ("teacher_seconds", ".2f"))
        ]
        body.append(
            [arm, _rate(arm, own[0]["rate"]), str(len(own)), *(cell(c.mean, c.stderr) for c in accuracies), *costs]
        )
    body += [[arm, "failed", "0", *["–"] * 5] for arm in failed]
    header = ["accuracy, %", "rate", "seeds", "text", "image", "s a step", "teacher: tokens a step", "its s"]
    return markdown(header, body)


def _rate(method: str, rate: float | None) -> str:
    if rate is None:
        return "–"
    tried = [arm.rate for arm in sweep(method)]
    return f"{rate:g}" + ("*" if rate in (min(tried), max(tried)) else "")


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
