"""Memory of a step as tables, by rank (`vold check`) and by phase (`vold plan`): both print one list of StageMemory."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vold.planning.gpu_specs import GpuSpec
from vold.planning.stage_memory import StageMemory
from vold.planning.step_sizes import StepSizes
from vold.run.timers import GIB

MODELS = ("weights", "gradients", "optimizer", "teacher", "sampler")
COMPONENTS = (*MODELS, "vision", "KV cache", "activations", "working", "batch")
TABLE_STYLE = {"box": SIMPLE_HEAD, "title_justify": "left", "caption_justify": "left"}


def fullest(stages: Sequence[StageMemory]) -> StageMemory:
    """The pipeline stage with the highest peak."""
    return max(stages, key=lambda stage: stage.peak)


def rank_table(stages: Sequence[StageMemory], sizes: StepSizes) -> Table:
    """GiB of each model on each rank of one model copy; data-parallel ranks hold the same."""
    caption = "Without frozen vision towers; what each phase adds: vold plan."
    if any(teacher.offload for teacher in sizes.trainer_teachers):
        caption += " The teacher waits in CPU memory while the student trains."
    table = Table(
        *("rank", *MODELS, "sum"),
        title=f"{sizes.processes} processes, {sizes.dp} copies of the model, GiB on each rank",
        caption=caption,
        **TABLE_STYLE,
    )
    for stage in stages:
        values = [stage.models[name] for name in MODELS]
        for tp_rank in range(stage.layout.tp):
            rank = f"tp {tp_rank} pp {stage.layout.pp_rank}"
            table.add_row(rank, *(f"{value / GIB:.3g}" for value in (*values, sum(values))))
    return table


def phase_table(stages: Sequence[StageMemory], sizes: StepSizes, gpu: str, spec: GpuSpec) -> Table:
    """GiB of each component in each phase on the fullest pipeline stage, and each phase's share of the GPU."""
    stage = fullest(stages)
    table = Table(
        *("GiB", *stage.phases),
        title=f"{sizes.processes} × {gpu}, {sizes.dp} copies of the model: {stage.name}",
        header_style="bold",
        **TABLE_STYLE,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in COMPONENTS:
        values = [stage.resident.get(name, 0.0) + added.get(name, 0.0) for added in stage.phases.values()]
        if any(values):
            table.add_row(name, *(f"{value / GIB:.2f}" if value else "·" for value in values))
    table.add_section()
    totals = [stage.total(phase) for phase in stage.phases]
    table.add_row("sum", *(f"{total / GIB:.2f}" for total in totals), style="bold")
    shares = (_share_of_gpu(total, spec) for total in totals)
    table.add_row(f"of {spec.memory / GIB:.4g}", *shares)
    return table


def _share_of_gpu(total: float, spec: GpuSpec) -> Text:
    fits = total <= spec.usable_memory
    return Text(f"{total / spec.memory:.0%} {'✓' if fits else '✗'}", "green" if fits else "red")
