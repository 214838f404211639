"""`make demo`: the whole two-stage pipeline in miniature, from nothing to five evaluated models and one page.

Its teacher is right on 70 % of the problems and sure of the facts that it has wrong, and RL takes 150 steps: where the
mask of VOLD matters (docs/science.md).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

from vold.io import log, write_atomically
from vold.miniature.make import MiniatureWorld
from vold.miniature.pipeline import Phase, run_phases
from vold.miniature.worlds import World, WorldKeys, open_world
from vold.parallel import cpu
from vold.report import accuracies, accuracy_table, read_runs, write_report

WORLD = WorldKeys(teacher_accuracy=0.70)
ARMS = {"vold-unmasked": 3e-4, "vold": 3e-4, "grpo": 1e-4}
"""Preset -> the learning rate of its sweep, part mask of docs/science.md."""
MODELS = ("base", "sft", "grpo", "vold-unmasked", "vold")
STEPS, SETTINGS = 150, ("prompts_per_step=32", "evaluation.every=30")
SFT_STEPS, RL_STEPS = 100, 60  # as in vold/miniature/configs


def run(root: Path = Path("runs"), *, parallel: int = 2) -> None:
    """Make teacher and base, traces, SFT, then GRPO and VOLD, without and with mask, from the same SFT checkpoint;
    evaluate all five models."""
    out = root / "demo"
    started = time.perf_counter()
    log.info("vold in miniature: text-only training, evaluated on text and on images")
    world = open_world(root, WORLD)
    seconds = {"teacher_and_base": time.perf_counter() - started}
    for group in phases(out, world):
        seconds |= run_phases(group, parallel=parallel)
    report = demo_report(out, seconds, time.perf_counter() - started)
    evaluations = read_runs([out / f"eval_{name}" for name in MODELS])
    log.info("\n" + accuracy_table(accuracies(evaluations, report)))  # bold as on the page
    log.info(f"\n{out / 'report.json'}\n{out / 'report.html'}")


def phases(out: Path, world: World) -> list[list[Phase]]:
    """Groups of phases; those of one group do not depend on each other."""
    trained = [
        rl_phase(out, world, preset, overrides=(*SETTINGS, f"optimizer.lr={rate}"), steps=STEPS)
        for preset, rate in ARMS.items()
    ]
    return [
        [traces_phase(out, world)],
        [sft_phase(out, world), eval_phase(out, world, "base", world.base)],
        trained,
        [eval_phase(out, world, name, out / name / "model") for name in ("sft", *ARMS)],
    ]


def traces_phase(out: Path, world: MiniatureWorld) -> Phase:
    settings = (f"teacher={world.teacher}", f"data.path={world.traces_prompts}")
    return Phase("traces", "traces.yaml", out / "traces", settings)


def sft_phase(
    out: Path, world: MiniatureWorld, name: str = "sft", overrides: tuple[str, ...] = (), steps: int = SFT_STEPS
) -> Phase:
    paths = (f"student={world.base}", f"pair_with={world.teacher}", f"data.path={out / 'traces' / 'traces'}")
    return Phase("sft", "sft.yaml", out / name, (*paths, *overrides, f"steps={steps}"), steps)


def rl_phase(
    out: Path,
    world: MiniatureWorld,
    preset: str,
    start: str = "sft",
    name: str = "",
    overrides: tuple[str, ...] = (),
    steps: int = RL_STEPS,
) -> Phase:
    settings = (f"student={out / start / 'model'}", *rl_paths(world), f"objective.preset={preset}")
    return Phase("rl", "rl.yaml", out / (name or preset), (*settings, *overrides, f"steps={steps}"), steps)


def rl_paths(world: MiniatureWorld) -> tuple[str, ...]:
    """Teacher, training problems and validation problems of the world, for vold/miniature/configs/rl.yaml."""
    return (
        f"teacher={world.teacher}",
        f"data.path={world.train}",
        f"evaluation.sets.text.path={world.text('val')}",
        f"evaluation.sets.image.path={world.image('val')}",
    )


def eval_phase(out: Path, world: MiniatureWorld, name: str, checkpoint: Path) -> Phase:
    settings = (
        f"checkpoint={checkpoint}",
        f"evaluation.sets.text.path={world.text('test')}",
        f"evaluation.sets.image.path={world.image('test')}",
    )
    return Phase("eval", "eval.yaml", out / f"eval_{name}", settings)


def read_evaluation(out: Path, name: str) -> dict[str, dict[str, float]]:
    """set -> {"accuracy", "stderr", "n", ...} of one evaluated model."""
    return json.loads((out / f"eval_{name}" / "evaluation.json").read_text())["sets"]


def demo_report(out: Path, seconds: dict[str, float], wall_seconds: float) -> dict:
    """Write report.json and report.html; a phase that was kept has its seconds from the report before."""
    evaluations = {name: read_evaluation(out, name) for name in MODELS}
    path = out / "report.json"
    before = json.loads(path.read_text())["seconds"] if path.exists() else {}
    started_here = {name: value for name, value in seconds.items() if name not in before or value > 1.0}
    report = {
        "accuracy": {model: {name: s["accuracy"] for name, s in sets.items()} for model, sets in evaluations.items()},
        "stderr": {model: {name: s["stderr"] for name, s in sets.items()} for model, sets in evaluations.items()},
        "n": {name: s["n"] for name, s in evaluations["base"].items()},
        "seconds": before | started_here,
        "wall_seconds": wall_seconds,
        "versions": versions(),
        "commit": commit(),
    }
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    runs = [out / name for name in ("sft", *ARMS, *(f"eval_{name}" for name in MODELS))]
    write_report(runs, out / "report.html", title="VOLD in miniature", accuracy=report, facts=report)
    return report


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, and the processor, which decides their last bits
    and so, after some updates, which answers are right."""
    packages = ("torch", "triton", "transformers", "megatron-core")
    return {name: importlib.metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "cpu": cpu.name(),
    }


def commit() -> str:
    """The checked-out commit of vold, with a mark when files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
