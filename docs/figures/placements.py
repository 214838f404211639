"""Draws placements.png, the picture of docs/rollouts.md: python docs/figures/placements.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, QUIET = "#222222", "#6b7785"
TRAINER, STUDENT, TEACHER, GPU = "#dbe7f6", "#fbe3d4", "#dff0d8", "#f5f6f8"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, **font) -> None:
    style = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.12", fc=colour, ec=QUIET, lw=0.8)
    axes.add_patch(style)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **{"fontsize": 8.5, **font})


def machine(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    box(axes, x, y, width, height, "", GPU)
    axes.text(x + 0.12, y + height - 0.13, text, ha="left", va="top", fontsize=8, color=QUIET)


def arrow(axes: Axes, start: tuple, end: tuple, text: str, text_at: tuple, *, both: bool = False, **font) -> None:
    style = {"arrowstyle": "<|-|>" if both else "-|>", "mutation_scale": 9, "color": INK, "lw": 1.0}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=2, shrinkB=2, **style))
    axes.text(*text_at, text, fontsize=7.5, color=INK, va="center", **{"ha": "center", **font})


def one_gpu(axes: Axes) -> None:
    machine(axes, 0, 0.2, 5.6, 3.6, "GPU 0: one process")
    box(axes, 0.3, 2.2, 2.1, 0.9, "trainer\n(student, Megatron)", TRAINER)
    box(axes, 0.3, 0.6, 2.1, 0.9, "teacher\n(fused scoring)", TEACHER)
    box(axes, 3.5, 2.2, 1.8, 0.9, "vLLM engine\n(student)", STUDENT)
    arrow(axes, (2.4, 2.85), (3.5, 2.85), "live\ntensors", (2.95, 3.22))
    arrow(axes, (3.5, 2.45), (2.4, 2.45), "ids,\nlog-probs", (2.95, 2.04))
    arrow(axes, (1.35, 2.2), (1.35, 1.5), "takes turns", (1.45, 1.85), both=True, ha="left")
    axes.text(4.4, 1.35, "sleep: true\nsleeps between phases", ha="center", va="center", fontsize=8, color=QUIET)


def one_node(axes: Axes) -> None:
    machine(axes, 0, 0.2, 5.6, 3.6, "one node: a process per GPU")
    for index, name in enumerate(("rank 0", "rank 1", "rank 7")):
        x = 0.2 + index * 1.8 + (0.2 if index == 2 else 0)
        box(axes, x, 2.3, 1.4, 0.8, f"vLLM engine\n({name})", STUDENT)
        box(axes, x, 0.7, 1.4, 0.8, f"trainer\n({name})", TRAINER)
        arrow(axes, (x + 0.45, 1.5), (x + 0.45, 2.3), "", (0, 0))
        arrow(axes, (x + 0.95, 2.3), (x + 0.95, 1.5), "", (0, 0))
    arrow(axes, (1.6, 1.1), (2.0, 1.1), "", (0, 0), both=True)
    axes.text(3.6, 2.7, "…", fontsize=14, color=INK, ha="center", va="center")
    arrow(axes, (3.4, 1.1), (4.0, 1.1), "", (0, 0), both=True)
    axes.text(
        2.8, 0.45, "up: live tensors · down: ids, log-probs · across: NCCL", fontsize=7.5, ha="center", va="center"
    )


def cluster(axes: Axes) -> None:
    machine(axes, 0, 0.2, 2.2, 3.6, "trainer: torchrun")
    box(axes, 0.3, 2.3, 1.6, 0.9, "rank 0", TRAINER)
    box(axes, 0.3, 0.7, 1.6, 0.9, "ranks 1 … n", TRAINER)
    machine(axes, 6.4, 2.15, 2.6, 1.65, "vold serve rl")
    box(axes, 6.6, 2.4, 1.05, 0.85, "engine\n:8006", STUDENT)
    box(axes, 7.75, 2.4, 1.05, 0.85, "engine\n:8007", STUDENT)
    machine(axes, 6.4, 0.2, 2.6, 1.65, "vold serve teacher")
    box(axes, 7.1, 0.45, 1.2, 0.85, "engine\n:8010", TEACHER)
    arrow(axes, (1.9, 3.2), (6.4, 3.2), "weights of version 7, from rank 0", (4.3, 3.37))
    arrow(axes, (2.2, 2.55), (6.4, 2.55), "prompt ids, images, seeds →", (4.3, 2.72), both=True)
    axes.text(4.3, 2.38, "← ids, log-probs, “version 7”", fontsize=7.5, ha="center", va="center")
    arrow(axes, (2.2, 1.0), (6.4, 1.0), "ids of failed responses →", (4.3, 1.17), both=True)
    axes.text(4.3, 0.83, "← their log-probs", fontsize=7.5, ha="center", va="center")


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 3.2), width_ratios=(5.6, 5.6, 9.0), layout="constrained")
    titles = ("one GPU", "one node, colocated", "cluster, engines of their own")
    for panel, draw, title in zip(axes, (one_gpu, one_node, cluster), titles, strict=True):
        draw(panel)
        panel.set_title(title, fontsize=10, color=INK)
        panel.autoscale_view()
        panel.set_aspect("equal")
        panel.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
