"""Lower bounds and estimates of a step's time by phase.

A bound follows from FLOP and bytes at the GPU's published peaks, an estimate from token rates that `vold profile` has
measured.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vold.config.schema import RlConfig
from vold.models.architecture import Architecture
from vold.models.flops import (
    active_parameters,
    expert_parameters,
    language_model_parameters,
    matmul_parameters,
    mlp_flops_share,
    segment_flops,
)
from vold.models.student import backward_of
from vold.planning.gpu_specs import GpuSpec
from vold.planning.memory_table import TABLE_STYLE
from vold.planning.stage_memory import kv_bytes
from vold.planning.step_sizes import StepSizes
from vold.untrusted import as_vold_writes

UPDATE_BYTES = 30  # of a parameter: fp32 gradient, master and moments read; master, moments and the bf16 weight written


@dataclass(frozen=True)
class PhaseWork:
    """Work of one rank in one phase: FLOP and bytes of memory traffic. tokens: what its rate counts, over all ranks."""

    flop: float
    moved: float
    tokens: float = 0.0

    def bound(self, spec: GpuSpec) -> float:
        """Seconds at the GPU's peaks."""
        return max(self.flop / spec.flops, self.moved / spec.bandwidth)


def phase_work(sizes: StepSizes) -> dict[str, PhaseWork]:
    """Work by phase of a step whose teacher scores every response; of several, each as many. Memory traffic counts
    weights, gradients, keys and values only: times that follow from it are lower bounds."""
    config, student = sizes.config, sizes.student
    weight_ranks = config.parallel.tp * config.parallel.pp
    model_ranks = weight_ranks * config.parallel.cp
    phases: dict[str, PhaseWork] = {}
    if isinstance(config, RlConfig) and not config.rollout.vllm.urls:
        phases["rollout"] = _rollout_work(sizes)
    tokens = float(sizes.responses_per_replica * sizes.response_tokens * sizes.dp)
    if teachers := sizes.trainer_teachers:  # of several each is planned to score as many responses
        weights = sum(_weight_traffic(sizes, teacher.arch) for teacher in teachers) / weight_ranks
        flop = sum(forward_flops(sizes, teacher.arch) for teacher in teachers) / sizes.scoring_teachers
        phases["teacher"] = PhaseWork(flop / model_ranks, weights, tokens)
    forward = forward_flops(sizes, student) / model_ranks
    weights = _weight_traffic(sizes, student) / weight_ranks
    phases["student_forward"] = PhaseWork(forward, weights, tokens)
    recomputed = {"selective": mlp_flops_share(student), "full": 1.0}.get(config.parallel.recompute, 0.0)
    # Backward reads weights twice, and reads and writes the fp32 gradients of each micro-batch: frozen ones (adapters
    # are left out) it reads once and computes no gradient of theirs.
    trained = {"train": config.train, "train_merger": config.vision.train_merger, "adapter": config.adapter}
    share = backward_of(student, **trained).weights / matmul_parameters(student)
    multiplied, moved = 1 + share, 1 + 5 * share
    phases["student_backward"] = PhaseWork((multiplied + recomputed) * forward, moved * weights, tokens)
    phases["optimizer"] = PhaseWork(0.0, _updated_parameters(sizes) * UPDATE_BYTES)
    return phases


def _updated_parameters(sizes: StepSizes) -> float:
    """Trained parameters that a rank updates; of a mixture's experts those that it holds."""
    parallel = sizes.config.parallel
    experts = min(sizes.student.layers * expert_parameters(sizes.student), sizes.trained_parameters)
    ranks = (parallel.tp * parallel.pp, parallel.ep * parallel.etp * parallel.pp)
    if parallel.distributed_optimizer:
        return sizes.trained_parameters / sizes.processes
    return (sizes.trained_parameters - experts) / ranks[0] + experts / ranks[1]


def _weight_traffic(sizes: StepSizes, arch: Architecture) -> float:
    """Bytes of one model copy's weights, read once for each micro-batch."""
    return float(sizes.dtype.itemsize * language_model_parameters(arch) * sizes.micro_batches)


def forward_flops(sizes: StepSizes, arch: Architecture) -> float:
    """FLOP of the forward pass over a step's tokens in one model copy. segment_flops counts forward and backward, three
    times as much."""
    prompt, response = sizes.prompt_tokens, sizes.response_tokens
    first = segment_flops(arch, prompt + response, prompt + response)
    others = (sizes.responses_per_prompt - 1) * segment_flops(arch, response, prompt + response)
    return sizes.prompts_per_replica * (first + others) / 3


def _rollout_work(sizes: StepSizes) -> PhaseWork:
    """Sampling, divided over all ranks. Each new token reads the weights, once for all sequences of a call, and the
    keys and values of the tokens before it."""
    config, arch, length = sizes.config, sizes.student, sizes.response_tokens
    prompts = -(-config.prompts_per_step // sizes.processes)
    responses = prompts * sizes.responses_per_prompt
    calls = -(-responses // config.rollout.sequences_per_call) if config.rollout.engine == "transformers" else 1
    cache = responses * length * (sizes.prompt_tokens + length / 2) * kv_bytes(arch, sizes.dtype.itemsize)
    weights = calls * length * sizes.dtype.itemsize * active_parameters(arch)
    flop = forward_flops(sizes, arch) * prompts / sizes.prompts_per_replica
    return PhaseWork(flop, weights + cache, float(config.prompts_per_step * sizes.responses_per_prompt * length))


def read_measured_rates(run_dir: Path) -> dict[str, float]:
    """Phase -> tokens per second of one process, from the table that `vold profile` writes. Raises ValueError when
    there is none."""
    path = run_dir / "profile" / "phases.csv"
    if not path.is_file():
        raise ValueError(f"--rates {run_dir}: no {path}; run `vold profile` on this machine first")
    with as_vold_writes(path), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        processes = len({row["rank"] for row in rows})
        return {
            row["phase"]: float(row["tokens_per_second"]) / processes
            for row in rows
            if row["rank"] == "0" and row["tokens_per_second"]
        }


def _pipeline_bubble(sizes: StepSizes) -> float:
    """Time that pipeline stages wait for each other, as a share of training's time without waiting."""
    parallel = sizes.config.parallel
    return (parallel.pp - 1) / (sizes.micro_batches * (parallel.vpp or 1))


def time_note(sizes: StepSizes, gpu: str, spec: GpuSpec) -> str:
    peaks = f"{spec.flops / 1e12:.0f} TFLOP/s and {spec.bandwidth / 1e12:.4g} TB/s"
    bubble = f" Waiting for other stages: {_pipeline_bubble(sizes):.1%} more of training."
    return f"At least: at the {gpu}'s published {peaks}; a bound, not a forecast." + (
        bubble if sizes.config.parallel.pp > 1 else ""
    )


def phase_bounds(sizes: StepSizes, spec: GpuSpec) -> dict[str, float]:
    """The least seconds of each phase of a step, pipeline stages' waiting for each other included."""
    slower = 1 + _pipeline_bubble(sizes)
    return {
        phase: work.bound(spec) * (slower if phase.startswith("student") else 1)
        for phase, work in phase_work(sizes).items()
    }


def time_table(sizes: StepSizes, spec: GpuSpec, rates: Mapping[str, float]) -> Table:
    """Work, lower bound and, of phases in `rates` (tokens per second of a process), estimated seconds of each phase."""
    table = Table(
        *("phase", "TFLOP", "GB moved", "at least, s", "tokens/s", "estimate, s"),
        title=f"A step's time on a rank, responses of {sizes.response_tokens} tokens",
        header_style="bold",
        **TABLE_STYLE,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    bounds, estimates = phase_bounds(sizes, spec), []
    for phase, work in phase_work(sizes).items():
        row = (f"{work.flop / 1e12:,.0f}", f"{work.moved / 1e9:,.0f}", _seconds(bounds[phase]))
        rate, estimate = rates.get(phase), ""
        if rate and work.tokens:
            estimates.append(work.tokens / (rate * sizes.processes))
            estimate = _seconds(estimates[-1])
        measured = "" if not work.tokens else f"{rate:,.0f}" if rate else "not measured"
        table.add_row(phase, *row, measured, estimate)
    total = _seconds(sum(estimates)) if estimates else "not measured"
    table.add_section()
    table.add_row("step", "", "", _seconds(sum(bounds.values())), "", total, style="bold")
    return table


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
