"""SFT students of three seeds, from which the methods, LoRA and the second act start: runs/reproduce/seed{0,1,2}.

A seed draws its own SFT order; teacher, base and problems are those of the demo, as the public checkpoints are the same
for every run of the paper.
"""

from __future__ import annotations

from pathlib import Path

from vold.miniature.demo import sft_phase
from vold.miniature.make import MiniatureWorld
from vold.miniature.pipeline import Phase

SEEDS = (0, 1, 2)


def start_phases(out: Path, folder: Path, world: MiniatureWorld, seed: int) -> list[Phase]:
    """Runs that make the starts of stage 2: SFT on the teacher's traces, and on those of another style."""
    seeded, traces = f"seed={seed}", f"data.path={out / 'traces' / 'traces'}"
    other = (seeded, f"data.path={world.traces_other}", "data.layout=prompt-response")
    return [
        sft_phase(folder, world, "sft", (seeded, traces)),
        sft_phase(folder, world, "misaligned-sft", other),
    ]
