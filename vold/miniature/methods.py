"""`python -m vold.miniature methods`: every method of configs/methods in the miniature, at equal rollouts.

Each method starts from the same SFT students, trains on as many prompts and responses, and has a
learning-rate sweep of its own: at the first seed, judged on validation problems, text and images alike; the best run is
that seed's run, and the other seeds take its rate. Only these runs are evaluated on the test problems. A method that
fails or diverges is a row marked as failed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vold.config import load_config, schema
from vold.evaluation.evaluator import evaluate
from vold.io import configure_logging, log, write_atomically
from vold.miniature.demo import commit, eval_phase, read_evaluation, rl_paths, traces_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.methods_figure import methods_figure
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.miniature.starts import SEEDS, start_phases
from vold.objectives import PRESETS, build_objective
from vold.report.tables import Mean, markdown
from vold.run.job import free_device_memory
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl

STEPS = 30
START = "sft"
METHODS = CONFIGS / "methods"
EXCLUDED = ("va-opd", "x-reasoner-sft")  # needs a vision-language teacher; is a first stage
RATES = {1: (1e-4, 3e-4, 6e-4), 4: (3e-5, 1e-4, 3e-4), 16: (1e-5, 3e-5, 1e-4)}  # by updates per step
STARTS = {"x-reasoner": "misaligned-sft"}  # traces in another style than the teacher's
# The config's beta, .3, is VOLD's in the miniature. KDRL's falls at the rate published, to a fifth in 80 steps.
_KDRL = ("objective.beta_end=0.06", "objective.beta_step=0.003")
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
RESULT = "result.json"  # of a method, below its folder: its rows and its sweep
_WORKER = "import sys; from vold.miniature.methods import run_method; run_method(*sys.argv[1:])"


def methods() -> list[str]:
    """Names of the methods that need a text-only teacher or none, in the order of the presets, then others."""
    names = [path.stem for path in sorted(METHODS.glob("*.yaml")) if path.stem not in EXCLUDED]
    return [name for name in PRESETS if name in names] + [name for name in names if name not in PRESETS]


@dataclass(frozen=True)
class Arm:
    """One method at one learning rate."""

    method: str
    rate: float

    def run_dir(self, root: Path, seed: int) -> Path:
        return _folder(root, self.method) / f"seed{seed}" / f"lr-{self.rate:g}"

    def phase(self, root: Path, world: MiniatureWorld, seed: int) -> Phase:
        """The training run at a seed."""
        overrides = (
            *rl_paths(world),
            str(METHODS / f"{self.method}.yaml"),
            *SETTINGS.get(self.method, ()),
            f"student={_starts(root, seed) / STARTS.get(self.method, START) / 'model'}",
            f"seed={seed}",
            f"steps={STEPS}",
            f"evaluation.every={STEPS}",
            f"optimizer.lr={self.rate}",
        )
        return Phase("rl", "rl.yaml", self.run_dir(root, seed), overrides, STEPS)


def sweep(method: str) -> list[Arm]:
    """The arms of a method's learning-rate sweep."""
    return [Arm(method, rate) for rate in RATES[_config_of(method).minibatches]]


@dataclass(frozen=True)
class MethodPhase(Phase):
    """All runs of one method in one process: starting one takes longer than a run."""

    @property
    def finished(self) -> bool:
        return (self.run_dir / RESULT).exists()

    def command(self) -> list[str]:
        return [sys.executable, "-c", _WORKER, self.run_dir.name, *self.overrides]


def run(root: Path = Path("runs"), *, parallel: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run all methods; write report.json, table.md and methods.png below runs/methods. Finished methods are kept."""
    started = time.perf_counter()
    world, starts = make_world(root / "miniature" / "seed0", seed=0), root / "reproduce"
    run_phases([traces_phase(starts, world)], parallel=1)
    run_phases([p for s in seeds for p in start_phases(starts, _starts(root, s), world, s)], parallel=parallel)
    evals = [eval_phase(_starts(root, seed), world, START, _starts(root, seed) / START / "model") for seed in seeds]
    run_phases(evals, parallel=parallel)
    arguments = (str(root), *map(str, seeds))
    method_phases = [MethodPhase("rl", "", _folder(root, method), arguments) for method in methods()]
    run_phases(method_phases, parallel=parallel, keep_going=True)
    report(root, seeds, time.perf_counter() - started)


def _folder(root: Path, method: str) -> Path:
    return root / "methods" / method


def _starts(root: Path, seed: int) -> Path:
    return root / "reproduce" / f"seed{seed}"


# -- one method ----------------------------------------------------------------------------------------------------


def run_method(method: str, root: str, *seeds: str) -> None:
    """Body of a worker process: the sweep at the first seed, the other seeds at its rate, the test problems."""
    configure_logging()
    folder, world = Path(root), MiniatureWorld.at(Path(root) / "miniature" / "seed0")
    first, *others = map(int, seeds)
    scores = {}
    for arm in sweep(method):
        if run_dir := _train(arm.phase(folder, world, first)):
            scores[arm] = validation(run_dir)
        free_device_memory()
    rows = []
    if scores:
        best = max(scores, key=lambda arm: scores[arm])  # the lower rate of equals
        for seed in (first, *others):
            if run_dir := _train(best.phase(folder, world, seed)):
                rows.append({"arm": method, "rate": best.rate, "seed": seed, **_test(run_dir, world)})
            free_device_memory()
    sweeps = [{"rate": arm.rate, "validation": scores.get(arm)} for arm in sweep(method)]
    write_atomically(_folder(folder, method) / RESULT, json.dumps({"rows": rows, "sweep": sweeps}, indent=1) + "\n")


def _train(phase: Phase) -> Path | None:
    """Train and return the run directory; None where training failed, as a method that diverges does (see its log)."""
    if not phase.finished:
        overrides = [*phase.overrides, f"run_dir={phase.run_dir}"]
        config = load_config(schema.RlConfig, CONFIGS / phase.config, overrides)
        try:
            train_rl(config, resume=(phase.run_dir / "config.yaml").exists())
        except (RuntimeError, ValueError) as error:
            log.info(f"{phase.run_dir}: {error}")
            return None
    return phase.run_dir


def _test(run_dir: Path, world: MiniatureWorld) -> dict[str, float]:
    phase = eval_phase(run_dir.parent, world, run_dir.name, run_dir / "model")
    if not phase.finished:
        overrides = [*phase.overrides, f"run_dir={phase.run_dir}"]
        evaluate(load_config(schema.EvalConfig, CONFIGS / phase.config, overrides))
    return _accuracies(run_dir.parent, run_dir.name)


def validation(run_dir: Path) -> float:
    """Mean accuracy on text and image validation problems at the end of a run."""
    last = read_rows(run_dir / "metrics.jsonl")[-1]
    return (last["accuracy_text"] + last["accuracy_image"]) / 2


# -- the report ----------------------------------------------------------------------------------------------------


def report(root: Path, seeds: Sequence[int], seconds: float) -> None:
    """Write the report of the finished methods."""
    results = {name: _result(root, name) for name in methods()}
    rows = [{"arm": START, "kind": "start", "seed": s, **_accuracies(_starts(root, s), START)} for s in seeds]
    for name, result in results.items():
        rows += [
            row | {"kind": kind_of(name)} | cost(Arm(name, row["rate"]).run_dir(root, row["seed"]))
            for row in result["rows"]
        ]
    arms = dict.fromkeys(row["arm"] for row in rows)
    accuracy = {arm: statistics.fmean(row["text"] + row["image"] for row in rows if row["arm"] == arm) for arm in arms}
    rows.sort(key=lambda row: -accuracy[row["arm"]])
    failed = [name for name, result in results.items() if not result["rows"]]
    facts = {"rows": rows, "failed": failed, "sweeps": {name: result["sweep"] for name, result in results.items()}}
    facts |= {"steps": STEPS, "versions": versions(), "commit": commit(), "wall_seconds": seconds}
    out = root / "methods"
    write_atomically(out / "report.json", json.dumps(facts, indent=1) + "\n")
    (out / "methods.png").write_bytes(methods_figure(rows, fmt="png"))
    table = methods_table(rows, failed)
    write_atomically(out / "table.md", table + "\n")
    log.info(f"\n{table}\n\n{out / 'methods.png'}")


def _result(root: Path, method: str) -> dict:
    path = _folder(root, method) / RESULT
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "sweep": []}


def _accuracies(out: Path, name: str) -> dict[str, float]:
    return {key: numbers["accuracy"] for key, numbers in read_evaluation(out, name).items()}


def kind_of(method: str) -> str:
    """The method's teacher, as one of methods_figure.KINDS."""
    objective = build_objective(_config_of(method).objective, max_response_tokens=1)
    return "teacher" if objective.needs_teacher else "its own average" if objective.uses_self_teacher else "no teacher"


def _config_of(method: str) -> schema.RlConfig:
    return load_config(
        schema.RlConfig, CONFIGS / "rl.yaml", [str(METHODS / f"{method}.yaml"), *SETTINGS.get(method, ())]
    )


def cost(run_dir: Path) -> dict[str, float]:
    """Cost of a step: CPU seconds (other work can slow these too) and the teacher's share of them, medians, and the
    mean number of response tokens that the teacher scores. Leaves out the last step, which evaluates too."""
    rows = read_rows(run_dir / "metrics.jsonl")[:-1]
    return {
        "cpu_seconds": statistics.median(row["cpu_seconds"] for row in rows),
        "teacher_share": statistics.median(row["seconds_teacher"] / row["seconds"] for row in rows),
        "teacher_tokens": statistics.fmean(row.get("kl_tokens", 0.0) for row in rows),
    }


def methods_table(rows: Sequence[dict], failed: Sequence[str]) -> str:
    """Markdown: mean ± standard error over seeds, and what a step costs. A rate at the edge of its sweep has a *."""
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seeds = [row for row in rows if row["arm"] == arm]
        accuracies = [Mean(tuple(row[name] for row in seeds)) for name in ("text", "image")]
        costs, rate = ["–"] * 3, "–"
        if "rate" in seeds[0]:
            cpu, share, tokens = (
                statistics.fmean(row[key] for row in seeds)
                for key in ("cpu_seconds", "teacher_share", "teacher_tokens")
            )
            costs = [f"{cpu:.2f}", *([f"{tokens:.0f}", f"{100 * share:.0f}"] if tokens else ["–", "–"])]
            rate = _rate(arm, seeds[0]["rate"])
        body.append([arm, rate, str(len(seeds)), *map(str, accuracies), *costs])
    body += [[arm, "failed", "0", *["–"] * 5] for arm in failed]
    header = [
        "accuracy, %",
        "rate",
        "seeds",
        "text",
        "image",
        "CPU s a step",
        "teacher: tokens a step",
        "% of the time",
    ]
    return markdown(header, body)


def _rate(method: str, rate: float) -> str:
    rates = [arm.rate for arm in sweep(method)]
    return f"{rate:g}" + ("*" if rate in (min(rates), max(rates)) else "")
