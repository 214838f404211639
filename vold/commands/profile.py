"""`vold profile`: a few steps of the stage that a config describes, and where their time and memory went.

Runs in a directory of its own below run_dir and saves no model, so it can be pointed at the config of a real run.
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
from vold.models.flops import peak_flops
from vold.models.layer_ops import layer_ops
from vold.report import lanes
from vold.report import profile as report
from vold.report.lanes import Span
from vold.run.step_profiler import StepProfiler
from vold.train.rl import train_rl
from vold.train.sft import train_sft

UNTIMED_AT_START, UNTIMED_AT_END = 1, 2  # steps: first use of everything; the trace's own warm-up and the traced step


def run(config: RlConfig | SftConfig, *, steps: int, beside: Sequence[Path] = ()) -> None:
    """`steps` timed steps, then one under torch's profiler, which slows it down. Writes into run_dir/profile:
    trace-rank*.json.gz (chrome://tracing, Perfetto), phases.md, phases.csv, phases.png, phases.svg, metrics.jsonl,
    timeline.csv, timeline.png, timeline.svg (rank 0's; with those of the run directories `beside`, profiled before).

    Raises ValueError when that directory holds a profile already, or one `beside` holds none.
    """
    folder = config.run_dir / "profile"
    others = {str(run_dir): _timeline_of(run_dir) for run_dir in beside}
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds a profile already; move it away, or give another run_dir=PATH")
    total = UNTIMED_AT_START + steps + UNTIMED_AT_END
    optimizer = config.optimizer.model_copy(update={"warmup_steps": min(config.optimizer.warmup_steps, total)})
    update = {"run_dir": folder, "steps": total, "optimizer": optimizer, "evaluation": EvaluationConfig()}
    train = train_rl if isinstance(config, RlConfig) else train_sft
    with _torch_profiler(folder, total) as tracer:
        profiler = StepProfiler(tracer)
        train(config.model_copy(update=update), profiler=profiler)
    timed = profiler.rows[UNTIMED_AT_START : UNTIMED_AT_START + steps]
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, timed)
    if dist.get_rank() == 0:
        _write(folder, ranks, *_facts(config))
        spans = [Span(*found) for step in profiler.intervals[UNTIMED_AT_START:][:steps] for found in step]
        _write_timeline(folder, others | {str(config.run_dir): spans})


def _torch_profiler(folder: Path, total: int) -> profile:
    """Traces the last step alone: traces of real steps are large, and profiling disturbs what it looks at."""

    def save(tracer: profile) -> None:
        tracer.export_chrome_trace(str(folder / f"trace-rank{dist.get_rank()}.json.gz"))

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    plan = schedule(skip_first=total - UNTIMED_AT_END, wait=0, warmup=1, active=1, repeat=1)
    return profile(activities=activities, schedule=plan, on_trace_ready=save)


def _facts(config: RlConfig | SftConfig) -> tuple[list[str], float]:
    """What the table was measured on, and the peak FLOP/s of all ranks that its MFU refers to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, world = getattr(torch, config.dtype), dist.get_world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    known = peak_flops(device)
    peak = known or _measured_flops(device, dtype)
    origin = "the device's table value" if known else f"of one {config.dtype} matmul, measured here"
    return [
        f"{world} × {name}, {config.dtype}; layers: {layer_ops(device.type, dtype)}.",
        f"Medians over steps. MFU: useful FLOP/s of the student over {peak / 1e12:.3g} TFLOP/s a rank ({origin}).",
        "Tokens are those of all ranks together. Memory: "
        + ("peak allocated." if device.type == "cuda" else "resident when the phase ends; for the step its peak."),
    ], peak * world


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matmuls."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _timeline_of(run_dir: Path) -> list[Span]:
    path = run_dir / "profile" / "timeline.csv"
    if not path.exists():
        raise ValueError(f"--beside {run_dir}: no {path}; profile that run first")
    return lanes.from_csv(path.read_text())


def _write_timeline(folder: Path, runs: dict[str, list[Span]]) -> None:
    """The last of `runs` is the one at hand."""
    *_, own = runs.values()
    (folder / "timeline.csv").write_text(lanes.as_csv(own))
    for fmt in ("png", "svg"):
        (folder / f"timeline.{fmt}").write_bytes(lanes.figure(runs, fmt=fmt))
    for name, spans in runs.items():
        idle = ", ".join(f"{row} {share:.0%}" for row, share in lanes.idle_shares(spans).items())
        Console().print(f"idle in {name}: {idle}", highlight=False, soft_wrap=True)


def _write(folder: Path, ranks: Sequence[Sequence[dict]], notes: list[str], peak: float) -> None:
    rows = report.phase_rows(ranks, peak)
    (folder / "phases.md").write_text(report.markdown(rows, notes))
    (folder / "phases.csv").write_text(report.as_csv(rows))
    for fmt in ("png", "svg"):
        (folder / f"phases.{fmt}").write_bytes(report.figure(ranks, fmt=fmt))
    console = Console()
    for line in notes:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(report.rich_table(rows))
    console.print(str(folder), highlight=False, soft_wrap=True)
