"""`vold profile`: time and memory by phase of a few steps of an rl or sft config.

It writes to run_dir/profile alone and saves no model, so the config of a real run can be profiled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule

from vold.config.schema import EvaluationConfig, RlConfig, SftConfig
from vold.io import log, write_atomically
from vold.models.architecture import Architecture
from vold.models.flops import peak_flops
from vold.models.layer_ops import layer_ops
from vold.report import phase_table, timeline
from vold.report.timeline import Interval
from vold.run.step_profiler import StepProfiler
from vold.train.rl import train_rl
from vold.train.sft import train_sft
from vold.untrusted import as_vold_writes

UNTIMED_AT_START, UNTIMED_AT_END = 1, 2  # steps: one that initialises; the tracer's warm-up and the traced step


def profile_steps(config: RlConfig | SftConfig, *, steps: int, beside: Sequence[Path] = ()) -> None:
    """Run `steps` timed steps, then one under torch's profiler, which slows it down.

    Writes to run_dir/profile: trace-rank*.json.gz (chrome://tracing, Perfetto), phases.md, phases.csv, phases.png,
    phases.svg, metrics.jsonl, timeline.csv, timeline.png and timeline.svg. The timeline is rank 0's; its figure also
    shows those of the run directories `beside`, which were profiled before. Raises ValueError when run_dir holds a
    profile already, or one of `beside` holds none.
    """
    folder = config.run_dir / "profile"
    timelines = {str(run_dir): _read_timeline(run_dir) for run_dir in beside}
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds a profile already; move it away, or give another run_dir=PATH")
    total_steps = UNTIMED_AT_START + steps + UNTIMED_AT_END
    optimizer = config.optimizer.model_copy(update={"warmup_steps": min(config.optimizer.warmup_steps, total_steps)})
    update = {"run_dir": folder, "steps": total_steps, "optimizer": optimizer, "evaluation": EvaluationConfig()}
    train = train_rl if isinstance(config, RlConfig) else train_sft
    with _torch_profiler(folder, total_steps) as tracer:
        profiler = StepProfiler(tracer)
        train(config.model_copy(update=update), profiler=profiler)
    timed = profiler.rows[UNTIMED_AT_START : UNTIMED_AT_START + steps]
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, timed)
    if dist.get_rank() == 0:
        _write_phases(folder, ranks, _head_flops(config), *_conditions(config))
        timed_steps = profiler.intervals[UNTIMED_AT_START:][:steps]
        intervals = [Interval(*interval) for step in timed_steps for interval in step]
        _write_timeline(folder, timelines | {str(config.run_dir): intervals})


def _torch_profiler(folder: Path, total_steps: int) -> profile:
    """A profiler that traces the last step alone: traces of real steps are large, and tracing slows a step down."""

    def save(tracer: profile) -> None:
        tracer.export_chrome_trace(str(folder / f"trace-rank{dist.get_rank()}.json.gz"))

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    steps = schedule(skip_first=total_steps - UNTIMED_AT_END, wait=0, warmup=1, active=1, repeat=1)
    return profile(activities=activities, schedule=steps, on_trace_ready=save)


def _conditions(config: RlConfig | SftConfig) -> tuple[list[str], float]:
    """(notes on device and units below the table, peak FLOP/s of all ranks that its MFU refers to)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, world = getattr(torch, config.dtype), dist.get_world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    published = peak_flops(device)
    peak = published or _measured_flops(device, dtype)
    origin = "the device's table value" if published else f"of one {config.dtype} matmul, measured here"
    return [
        f"{world} × {name}, {config.dtype}; layers: {layer_ops(device.type, dtype)}.",
        f"Medians over steps. MFU: useful FLOP/s of the student over {peak / 1e12:.3g} TFLOP/s a rank ({origin}).",
        "Tokens are those of all ranks together. Memory: "
        + ("peak allocated." if device.type == "cuda" else "resident when the phase ends; for the step its peak."),
    ], peak * world


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the fastest of five square matrix multiplications."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _head_flops(config: RlConfig | SftConfig) -> float:
    """FLOPs of the head for a token with a target: three products with its weight, two where that is not trained."""
    arch = Architecture.from_pretrained(config.student)
    return 2.0 * (3 if config.adapter is None else 2) * arch.vocab * arch.hidden


def _read_timeline(run_dir: Path) -> list[Interval]:
    path = run_dir / "profile" / "timeline.csv"
    if not path.exists():
        raise ValueError(f"--beside {run_dir}: no {path}; profile that run first")
    with as_vold_writes(path):
        return timeline.from_csv(path.read_text())


def _write_timeline(folder: Path, runs: dict[str, list[Interval]]) -> None:
    """Write the last of `runs` as CSV and all of them as a figure."""
    *_, intervals = runs.values()
    write_atomically(folder / "timeline.csv", timeline.to_csv(intervals))
    for fmt in ("png", "svg"):
        write_atomically(folder / f"timeline.{fmt}", timeline.workers_figure(runs, fmt=fmt))
    for name, intervals in runs.items():
        idle = ", ".join(f"{row} {share:.0%}" for row, share in timeline.idle_shares(intervals).items())
        log.info(f"idle in {name}: {idle}")


def _write_phases(
    folder: Path, ranks: Sequence[Sequence[dict]], head_flops: float, notes: list[str], peak: float
) -> None:
    rows = phase_table.phase_rows(ranks, peak, head_flops)
    fastest = max((row.mfu for row in rows if row.mfu), default=0.0)
    if fastest > 1.0 and not torch.cuda.is_available():  # a matmul of one size is not the most that a CPU can do
        rows = phase_table.phase_rows(ranks, fastest * peak, head_flops)
        notes = [*notes, f"A phase was {fastest:.2f} times as fast as that matmul: MFU refers to it instead."]
    write_atomically(folder / "phases.md", phase_table.to_markdown(rows, notes))
    write_atomically(folder / "phases.csv", phase_table.to_csv(rows))
    for fmt in ("png", "svg"):
        write_atomically(folder / f"phases.{fmt}", phase_table.phase_figure(ranks, fmt=fmt))
    for line in notes:
        log.info(line)
    Console().print(phase_table.to_rich(rows))
    log.info(str(folder))
