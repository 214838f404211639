"""`make reproduce`: three seeds of GRPO, VOLD, VOLD without mask and the misaligned start.

The paper's figure 3 (VOLD against GRPO), figure 5 (masking) and table 2 (SFT on traces of another style: does
distillation still help?) in miniature, with two controls: twice the SFT steps, and SFT on all traces. A seed draws its
own SFT order, RL prompts and samples; teacher, base and problems are those of the demo, as the public checkpoints are
the same for every run of the paper.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from vold.io import log, write_atomically
from vold.miniature.demo import SFT_STEPS, commit, eval_phase, phases, read_evaluation, rl_phase, sft_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.pipeline import Phase, run_phases
from vold.report import curves, read_runs, seeds_errorbars, seeds_table, write_report

SEEDS = (0, 1, 2)
FIGURES_3_AND_5 = ("reward", "kl_teacher", "accuracy_text", "accuracy_image")
CONTROLS = ("sft-longer", "sft-all-traces")
ARMS = ("sft", "grpo", "vold", "vold-unmasked", "misaligned-sft", "misaligned-grpo", "misaligned-vold", *CONTROLS)


def run(root: Path = Path("runs"), *, parallel: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run all arms; write report.json, table.md, two figures and report.html below runs/reproduce.

    Finished arms are kept.
    """
    started = time.perf_counter()
    out = root / "reproduce"
    world = make_world(root / "miniature" / "seed0", seed=0)
    run_phases(phases(out, world)[0], parallel=1)  # the teacher's traces, shared by all seeds
    folders = [out / f"seed{seed}" for seed in seeds]
    plans = [_stages(out, folder, world, seed) for folder, seed in zip(folders, seeds, strict=True)]
    for stage in zip(*plans, strict=True):
        run_phases([phase for group in stage for phase in group], parallel=parallel)
    rows = [_row(seed, folder, arm) for seed, folder in zip(seeds, folders, strict=True) for arm in ARMS]
    _write(out, rows, folders, time.perf_counter() - started)


def _stages(out: Path, folder: Path, world: MiniatureWorld, seed: int) -> list[list[Phase]]:
    """SFT runs, then RL runs, then evaluations."""
    seeded, start = (f"seed={seed}",), "misaligned-sft"
    traces = _traces(out, seed)
    return [
        [
            *start_phases(out, folder, world, seed),
            sft_phase(folder, world, "sft-longer", traces, steps=2 * SFT_STEPS),
            sft_phase(folder, world, "sft-all-traces", (*traces, "data.limit=null")),
        ],
        [
            *(rl_phase(folder, world, preset, overrides=seeded) for preset in ("grpo", "vold", "vold-unmasked")),
            *(rl_phase(folder, world, preset, start, f"misaligned-{preset}", seeded) for preset in ("grpo", "vold")),
        ],
        [eval_phase(folder, world, arm, folder / arm / "model") for arm in ARMS],
    ]


def start_phases(out: Path, folder: Path, world: MiniatureWorld, seed: int) -> list[Phase]:
    """Runs that make the starts of stage 2: SFT on the teacher's traces, and on those of another style."""
    other = (f"seed={seed}", f"data.path={world.traces_other}", "data.layout=prompt-response")
    return [
        sft_phase(folder, world, "sft", _traces(out, seed)),
        sft_phase(folder, world, "misaligned-sft", other),
    ]


def _traces(out: Path, seed: int) -> tuple[str, ...]:
    return f"seed={seed}", f"data.path={out / 'traces' / 'traces'}"


def _row(seed: int, folder: Path, arm: str) -> dict:
    sets = read_evaluation(folder, arm)
    return {"seed": seed, "arm": arm, **{name: numbers["accuracy"] for name, numbers in sets.items()}}


def _write(out: Path, rows: list[dict], folders: list[Path], seconds: float) -> None:
    table = seeds_table(rows)
    facts = {"rows": rows, "versions": versions(), "commit": commit(), "wall_seconds": seconds}
    write_atomically(out / "report.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(out / "table.md", table + "\n")
    runs = [folder / arm for folder in folders for arm in ("grpo", "vold", "vold-unmasked")]
    (out / "curves.png").write_bytes(curves(read_runs(runs), FIGURES_3_AND_5, fmt="png"))
    (out / "seeds.png").write_bytes(seeds_errorbars(rows, fmt="png"))
    write_report(runs, out / "report.html", title="VOLD in miniature, three seeds", seeds=rows, facts=facts)
    log.info(f"\n{table}\n\n{out / 'report.html'}")
