"""LoRA of rank 16 beside full training in the miniature: VOLD from the same SFT students, equal rollouts, three seeds.

Full training has the rate of the demo; LoRA's is the better of two at the first seed, judged on validation problems.
Only the chosen runs are evaluated on the test problems. Bytes are those of the last checkpoint on disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from vold.io import log, write_atomically
from vold.miniature.demo import RL_STEPS, commit, eval_phase, read_evaluation, rl_phase, traces_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.methods import validation
from vold.miniature.pipeline import Phase, run_phases
from vold.miniature.starts import SEEDS, start_phases
from vold.report.tables import Mean, markdown
from vold.run.run_dir import read_rows

RANK = 16
RATES = (1e-3, 3e-3)


def run(root: Path = Path("runs"), *, parallel: int = 1, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run both arms; write report.json and table.md below runs/lora. Finished runs are kept."""
    started, out = time.perf_counter(), root / "lora"
    world = make_world(root / "miniature" / "seed0", seed=0)
    run_phases([traces_phase(out, world)], parallel=parallel)
    folders = {seed: out / f"seed{seed}" for seed in seeds}
    run_phases([start_phases(out, folders[seed], world, seed)[0] for seed in seeds], parallel=parallel)
    first = [_lora(folders[seeds[0]], world, seeds[0], rate) for rate in RATES]
    run_phases(first, parallel=parallel)
    scores = {rate: validation(phase.run_dir) for rate, phase in zip(RATES, first, strict=True)}
    rate = max(scores, key=lambda rate: scores[rate])
    runs = {
        (arm, seed): phase
        for seed, folder in folders.items()
        for arm, phase in (
            ("full", rl_phase(folder, world, "vold", name="full", overrides=(f"seed={seed}",))),
            ("lora", _lora(folder, world, seed, rate)),
        )
    }
    run_phases(list(runs.values()), parallel=parallel)
    evals = [eval_phase(folder, world, "sft", folder / "sft" / "model") for folder in folders.values()]
    evals += [eval_phase(p.run_dir.parent, world, p.run_dir.name, p.run_dir / "model") for p in runs.values()]
    run_phases(evals, parallel=parallel)
    rows = [_row("sft", seed, folder / "sft") for seed, folder in folders.items()]
    rows += [_row(arm, seed, phase.run_dir) for (arm, seed), phase in runs.items()]
    facts = {"rows": rows, "rank": RANK, "validation": scores, "rate": rate, "steps": RL_STEPS, "versions": versions()}
    facts |= {"commit": commit(), "wall_seconds": time.perf_counter() - started}
    write_atomically(out / "report.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(out / "table.md", table(rows) + "\n")
    log.info(f"\n{table(rows)}\n\n{out / 'report.json'}")


def _lora(folder: Path, world: MiniatureWorld, seed: int, rate: float) -> Phase:
    adapter = f"adapter={{rank: {RANK}, alpha: {2 * RANK}}}"
    overrides = (f"seed={seed}", adapter, f"optimizer.lr={rate}")
    return rl_phase(folder, world, "vold", name=f"lora-{rate:g}", overrides=overrides)


def _row(arm: str, seed: int, run_dir: Path) -> dict:
    sets = read_evaluation(run_dir.parent, run_dir.name)
    row = {"arm": arm, "seed": seed, **{name: numbers["accuracy"] for name, numbers in sets.items()}}
    latest = run_dir / "checkpoints" / "latest"
    if arm != "sft" and latest.exists():
        files = (run_dir / "checkpoints" / latest.read_text().strip()).glob("rank-*.safetensors")
        row["checkpoint_bytes"] = sum(file.stat().st_size for file in files)
        row["cpu_seconds"] = sum(step["cpu_seconds"] for step in read_rows(run_dir / "metrics.jsonl"))
    return row


def table(rows: Sequence[dict]) -> str:
    """Markdown: mean ± standard error over the seeds, and the bytes of a checkpoint."""
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seeds = [row for row in rows if row["arm"] == arm]
        accuracies = [str(Mean(tuple(row[name] for row in seeds))) for name in ("text", "image")]
        size = seeds[0].get("checkpoint_bytes")
        body.append([arm, str(len(seeds)), *accuracies, f"{size / 1e6:.2f}" if size else "–"])
    return markdown(["accuracy, %", "seeds", "text", "image", "checkpoint, MB"], body)
