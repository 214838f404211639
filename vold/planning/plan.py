"""`vold plan`: memory of a step by phase, and its time, on GPUs that need not be there. A config that does not fit is
refused, with the cheapest change of settings that does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from vold.config.schema import RlConfig, SftConfig
from vold.models.flops import active_parameters, language_model_parameters
from vold.planning.gpu_specs import GPU_SPECS, GpuSpec
from vold.planning.machine import hide_gpus
from vold.planning.memory_table import fullest, phase_table
from vold.planning.stage_memory import StageMemory, TraceCache, stage_memories
from vold.planning.step_sizes import StepSizes
from vold.planning.step_time import phase_bounds, read_measured_rates, time_note, time_table
from vold.planning.teacher_cost import TeacherCost, TeacherQuestion, write_figure
from vold.planning.tunable_settings import propose_settings
from vold.run.timers import GIB


def print_plan(
    config: SftConfig | RlConfig,
    *,
    gpu: str,
    processes: int,
    response_tokens: int | None = None,
    rates: Path | None = None,
    beside: TeacherQuestion | None = None,
) -> None:
    """Print memory and time of a step on `processes` GPUs of the kind `gpu`, a key of GPU_SPECS.

    response_tokens: mean length of a response, for the time; memory is planned for the longest. rates: run directory
    that `vold profile` has written to, for an estimate beside the lower bound. beside: what is asked of a teacher on
    GPUs of its own. Raises ValueError where the layout fits neither the processes nor the models, or a phase does not
    fit the GPU.
    """
    hide_gpus()
    spec, sizes, cache = GPU_SPECS[gpu], StepSizes(config, processes), TraceCache()
    measured = read_measured_rates(rates) if rates else {}
    stages = stage_memories(sizes, "cuda", cache)
    console = Console()
    console.print(phase_table(stages, sizes, gpu, spec))
    for line in _memory_notes(stages, sizes):
        console.print(line, highlight=False)
    console.print("")
    timed = replace(sizes, mean_response_tokens=response_tokens)
    console.print(time_table(timed, spec, measured))
    console.print(time_note(timed, gpu, spec), highlight=False)
    if beside is not None:
        _print_teacher_cost(timed, spec, beside, console)
    if fullest(stages).peak > spec.usable_memory:
        raise ValueError(_refusal(stages, sizes, gpu, cache))
    hours = config.steps * sum(phase_bounds(timed, spec).values()) / 3600
    console.print(
        f"✓ fits: {fullest(stages).peak / GIB:.1f} of {spec.usable_memory / GIB:.1f} GiB in its fullest phase. "
        f"{config.steps} steps: {hours:.3g} hours at least",
        highlight=False,
    )


def _print_teacher_cost(sizes: StepSizes, spec: GpuSpec, asked: TeacherQuestion, console: Console) -> None:
    cost = TeacherCost.from_sizes(sizes, spec)
    points = [cost.point(gpus, asked.accuracy) for gpus in (0, *asked.gpus)]
    console.print("")
    console.print(cost.table(points))
    console.print(cost.note(points), highlight=False)
    if asked.plot is not None:
        write_figure(cost, asked.gpus, asked.accuracy, asked.plot)
        console.print(f"The figure: {asked.plot}", highlight=False)


def _memory_notes(stages: Sequence[StageMemory], sizes: StepSizes) -> Iterator[str]:
    if len(stages) > 1:
        yield "Peak by stage: " + ", ".join(f"{stage.name} {stage.peak / GIB:.1f}" for stage in stages)
    teachers = [("teacher", teacher.arch) for teacher in sizes.trainer_teachers]
    if len(teachers) > 1:
        yield f"{len(teachers)} teachers are in the trainer; each is planned to score as many responses."
    for role, arch in (("student", sizes.student), *teachers):
        if arch.mixture is not None:
            total, active = language_model_parameters(arch) / 1e9, active_parameters(arch) / 1e9
            yield (
                f"The {role} has {total:.2f} billion parameters, of which a token meets {active:.2f}; every expert is "
                "planned to get as many tokens."
            )
    yield (
        f"Micro-batches of {sizes.micro_batch_tokens} tokens, {sizes.micro_batches} a step. A tenth of the GPU is left "
        "to CUDA, NCCL and the allocator (assumed, not measured). Layers as with liger-kernel, flash-attn (2 or 3) and "
        "flash-linear-attention; not counted are vLLM's own activations and CUDA graphs."
    )
    host = max(stage.host for stage in stages)
    if host:
        yield f"Offloaded to CPU memory: {host / GIB:.1f} GiB for each process of a node."


def _refusal(stages: Sequence[StageMemory], sizes: StepSizes, gpu: str, cache: TraceCache) -> str:
    """One line: the phase that does not fit, by how much, and the settings that would."""
    spec, stage = GPU_SPECS[gpu], fullest(stages)
    phase = max(stage.phases, key=stage.total)
    line = (
        f"phase {phase} needs {stage.peak / GIB:.1f} GiB on {stage.name} and {gpu} has "
        f"{spec.usable_memory / GIB:.1f} to give; "
    )
    proposal = propose_settings(sizes, spec, cache)
    if proposal is None:
        return line + f"no setting that was tried fits {sizes.processes} processes: plan more, or a larger GPU"
    overrides, peak = proposal
    return line + f"{' '.join(overrides)} fits, with {peak / GIB:.1f}"
