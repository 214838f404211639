"""`python -m benchmarks.roofline --step`: predicts a whole training step on a GPU from a trace on fake CUDA tensors.

Every operation of the trace takes the longer of its FLOPs at the matmul rate and of its bytes at the memory rate
(`step_costs`), and a phase the longer of its operations and of the host that launches them. Nothing here is measured.
Writes results/STEP.md and results/step.csv.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vold.models.architecture import Architecture
from vold.models.flops import training_flops
from vold.planning.gpu_specs import GPU_SPECS
from vold.types import MicroBatch

from . import step_costs
from .fake_cuda.work import Operation
from .harness import read_rows, table_line
from .roofline import GPUS, RESULTS, Gpu

SPECS = {"A100": "a100-80g", "H100": "h100-80g", "H200": "h200"}
MICROBATCH_TOKENS = (16384, 4096)
"""Limits of a micro-batch: of the 16 sequences of `fake_cuda.step.Case` they make two of 12,061 tokens at most, and
eight of 3,310."""
STUDENT = ("forward", "head", "backward", "optimizer")
HOST_RATIO = {"forward": 0.587, "backward": 0.839}
"""Host time of a layer now over that at commit 9429b30: one run of `benchmarks.host_time --before`, 2026-11-30."""
HOST_LAYER = {"forward": 0.95e-3 * HOST_RATIO["forward"], "backward": 1.05e-3 * HOST_RATIO["backward"]}
HOST_LAYER |= {"teacher": HOST_LAYER["forward"]}
"""Seconds: 0.95 and 1.05 ms were assumed for that commit."""
HOST_LAUNCH = 8e-6
LOSERS = 10
ASSUMPTIONS = f"""\
- Rates are those of ROOFLINE.md, shares published for large matmuls and copies. A matmul takes whole waves of
  128 × 256 blocks; the head's row kernels run under the next matmul, half of its fp32 results is written under one.
  Its chunks are those that an H200 takes.
- flash-attn 2 reaches {" and ".join(f"{x / 1e12:.0f}" for x in step_costs.ATTENTION[80])} TFLOP/s (forward, backward)
  on an A100, {" and ".join(f"{x / 1e12:.0f}" for x in step_costs.ATTENTION[90])} on Hopper, and its backward pass has
  scratch of its own: fp32 dQ, and dK and dV of every query head.
- Other operations pass each tensor once at the memory's rate; so do our kernels of a layer, which need fewer
  instructions than an H200 issues meanwhile (AOT.md). A scatter that sorts is 8 to 14 kernels.
- Between two kernels the device idles {step_costs.GAP * 1e6:.0f} µs.
- The host needs {HOST_LAYER["forward"] * 1e3:.2f} ms a layer forward and {HOST_LAYER["backward"] * 1e3:.2f} ms
  backward (0.95 and 1.05 ms, assumed before, times {HOST_RATIO["forward"]} and {HOST_RATIO["backward"]}, which
  `benchmarks.host_time` measured on a CPU), {HOST_LAUNCH * 1e6:.0f} µs for every other launch; a phase takes as long
  as the slower of host and device.
- Adam has its moments, every step is clipped, one GPU: no collective takes time. Rollouts, weight export, and a
  teacher's copy from the host are left out. No recomputation.
- Loss: predicted time beyond the FLOPs at the matmul rate."""


@dataclass(frozen=True)
class Setup:
    """What a trace does not say. `useful_flops` of the student's step: those of `vold.models.flops`."""

    micro_batches: int
    tokens: int
    largest: int
    layers: Mapping[str, int]
    """Phase of HOST_LAYER -> layers of its model."""
    useful_flops: float


@dataclass(frozen=True)
class Phase:
    """A phase of the whole step; seconds of the device and of the host that launches."""

    name: str
    flops: float
    bytes: float
    launches: int
    device_s: float
    host_s: float

    @property
    def seconds(self) -> float:
        return max(self.device_s, self.host_s)


@dataclass(frozen=True)
class Loss:
    """Seconds that a group of operations takes beyond its FLOPs at the matmul rate."""

    group: str
    seconds: float


def phase_of(op: Operation) -> str | None:
    """The phase to which the prediction charges an operation; None: to none, as it is no part of a later step."""
    if op.phase == "teacher":
        return "teacher"
    if op.phase in ("optimizer", "step"):
        return None if step_costs.is_first_step(op) else "optimizer"
    if op.phase not in ("student_forward", "student_backward"):
        return None
    ours = ("vold/trainer/metrics.py", "vold/trainer/trainer.py:_loss", "vold/trainer/pipeline.py:head")
    is_head = step_costs.is_of_head(op) or op.site.startswith(ours)
    return "head" if is_head else op.phase.removeprefix("student_")


def charged(operations: Mapping[Operation, int]) -> dict[Operation, tuple[str, int]]:
    """Operation that runs on the device -> (its phase, how often)."""
    phases = {op: phase_of(op) for op in operations if not op.is_free and op.kind != "collective"}
    return {op: (phase, operations[op]) for op, phase in phases.items() if phase is not None}


def predict(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu) -> list[Phase]:
    """The student's phases in their order, then the teacher's, if it has one."""
    device, flops, moved, launches = Counter(), Counter(), Counter(), Counter()
    overlapped = _overlapped(operations, setup)
    for op, (phase, count) in charged(operations).items():
        device[phase] += count * step_costs.seconds(op, gpu, overlapped[op.phase])
        flops[phase] += count * op.flops
        moved[phase] += count * step_costs.traffic(op)
        launches[phase] += count * step_costs.kernels(op)
    names = [name for name in (*STUDENT, "teacher") if launches[name]]
    return [
        Phase(name, flops[name], moved[name], launches[name], device[name], _host(name, launches[name], setup))
        for name in names
    ]


def _host(phase: str, launches: int, setup: Setup) -> float:
    if phase in HOST_LAYER:
        return setup.micro_batches * setup.layers[phase] * HOST_LAYER[phase]
    return launches * HOST_LAUNCH


def _overlapped(operations: Mapping[Operation, int], setup: Setup) -> Counter[str]:
    """Phase -> whether its head has more chunks (tiles) than micro-batches, so that one runs under another's matmul."""
    folds: Counter[str] = Counter()
    for op, count in operations.items():
        folds[op.phase] += count * (op.name == "fold_kernel")
    return Counter({phase: int(count > setup.micro_batches) for phase, count in folds.items()})


def losses(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu, teacher: bool = False) -> list[Loss]:
    """Of the student's step, or of the teacher's score; the largest first."""
    found: Counter[str] = Counter()
    overlapped = _overlapped(operations, setup)
    for op, (phase, count) in charged(operations).items():
        if (phase == "teacher") == teacher:
            spent = step_costs.seconds(op, gpu, overlapped[op.phase]) - op.flops / gpu.matmul
            found[step_costs.group(op)] += count * spent
    for phase in predict(operations, setup, gpu):
        if (phase.name == "teacher") == teacher and phase.host_s > phase.device_s:
            found[HOST] += phase.host_s - phase.device_s
    return [Loss(name, seconds) for name, seconds in found.most_common()]


HOST = "host slower than the device"
REMEDIES = step_costs.REMEDIES | {HOST: "less Python a layer; the layer compiled, or CUDA graphs for fixed shapes"}


def student_seconds(phases: Sequence[Phase]) -> float:
    return sum(phase.seconds for phase in phases if phase.name in STUDENT)


def mfu(phases: Sequence[Phase], setup: Setup, gpu: Gpu) -> float:
    """Useful FLOPs of the student's step over what the data sheet's rate would do in its time."""
    return setup.useful_flops / student_seconds(phases) / GPU_SPECS[SPECS[gpu.name]].flops


def setup_of(micro_batches: Sequence[MicroBatch], student: Architecture, teacher: Architecture | None) -> Setup:
    """Of the step that a trace executed."""
    lengths = [m.tokens.input_ids_T.numel() for m in micro_batches]
    layers = {"forward": student.layers, "backward": student.layers}
    return Setup(
        micro_batches=len(lengths),
        tokens=sum(lengths),
        largest=max(lengths),
        layers=layers if teacher is None else layers | {"teacher": teacher.layers},
        useful_flops=sum(training_flops(student, m.tokens) for m in micro_batches),
    )


# Tables -------------------------------------------------------------------------------------------------------------


def rows(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu) -> list[dict[str, str]]:
    """The CSV's rows of one GPU and micro-batch size: a phase each, then the student's step."""
    phases = predict(operations, setup, gpu)
    table = [{"gpu": gpu.name, "micro_batch": str(setup.largest)} | _cells(phase) for phase in phases]
    step = [phase for phase in phases if phase.name in STUDENT]
    total = {"flops": 0.0, "bytes": 0.0, "launches": 0, "device_s": 0.0, "host_s": 0.0}
    total = {key: sum(asdict(phase)[key] for phase in step) for key in total}
    cells = _cells(Phase("student step", **total)) | {"ms": f"{student_seconds(phases) * 1e3:.1f}"}
    cells["mfu"] = f"{mfu(phases, setup, gpu):.3f}"
    return [*table, {"gpu": gpu.name, "micro_batch": str(setup.largest)} | cells]


def _cells(phase: Phase) -> dict[str, str]:
    return {
        "phase": phase.name,
        "tflop": f"{phase.flops / 1e12:.2f}",
        "gb": f"{phase.bytes / 1e9:.1f}",
        "launches": str(phase.launches),
        "device_ms": f"{phase.device_s * 1e3:.1f}",
        "host_ms": f"{phase.host_s * 1e3:.1f}",
        "ms": f"{phase.seconds * 1e3:.1f}",
        "mfu": "",
    }


def report(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu) -> str:
    """Markdown of one GPU and micro-batch size: phases, then what loses time."""
    table = rows(operations, setup, gpu)
    columns = [key for key in table[0] if key not in ("gpu", "micro_batch")]
    heads = {"tflop": "TFLOP", "gb": "GB", "device_ms": "device ms", "host_ms": "host ms", "mfu": "MFU"}
    lines = [table_line([heads.get(key, key) for key in columns]), table_line(["---"] * len(columns))]
    lines += [table_line([row[key] for key in columns]) for row in table]
    teacher = {loss.group: loss.seconds for loss in losses(operations, setup, gpu, teacher=True)}
    lost = [table_line(("what", "student's loss ms", "teacher's loss ms", "remedy")), table_line(["---"] * 4)]
    for loss in losses(operations, setup, gpu)[:LOSERS]:
        beside = f"{teacher[loss.group] * 1e3:.1f}" if loss.group in teacher else ""
        lost.append(table_line((loss.group, f"{loss.seconds * 1e3:.1f}", beside, REMEDIES[loss.group])))
    title = f"## {gpu.name}, {setup.micro_batches} micro-batches of {setup.largest:,} tokens at most"
    return "\n".join([title, "", _layers(operations, setup, gpu), "", *lines, "", *lost])


def _layers(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu) -> str:
    phases = {phase.name: phase for phase in predict(operations, setup, gpu)}
    parts = []
    for name in HOST_LAYER.keys() & phases.keys():
        passes = setup.micro_batches * setup.layers[name]
        per_layer = f"{phases[name].launches / passes:.1f} launches, {phases[name].device_s / passes * 1e3:.2f} ms"
        parts.append(f"{name} {per_layer}")
    shares = "; ".join(sorted(parts))
    return f"{setup.tokens:,} tokens. A layer and micro-batch (the pass divided by its layers): {shares}."


def summary(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of docs/speed.md: a GPU and micro-batch size each, ms of the phases, from the CSV's rows."""
    columns = (*STUDENT, "student step", "teacher")
    lines = [table_line(("GPU", "micro-batch", *columns, "MFU")), table_line(["---"] * (len(columns) + 3))]
    for gpu, size in dict.fromkeys((row["gpu"], row["micro_batch"]) for row in table):
        found = {row["phase"]: row for row in table if (row["gpu"], row["micro_batch"]) == (gpu, size)}
        times = [f"{float(found[name]['ms']):.0f}" for name in columns]
        lines.append(table_line((gpu, f"{int(size):,}", *times, f"{float(found['student step']['mfu']):.1%}")))
    return lines


def compared(before: Sequence[Mapping[str, str]], table: Sequence[Mapping[str, str]]) -> list[str]:
    """The student's step in step-before.csv beside the same case now."""
    columns = ("launches", "gb", "device_ms", "host_ms", "ms", "mfu")
    lines = [table_line(("GPU", "micro-batch", *columns)), table_line(["---"] * (len(columns) + 2))]
    earlier = {(row["gpu"], row["micro_batch"]): row for row in before if row["phase"] == "student step"}
    for row in table:
        old = earlier.get((row["gpu"], row["micro_batch"]))
        if row["phase"] == "student step" and old is not None:
            cells = [f"{old[column]} → {row[column]}" for column in columns]
            lines.append(table_line((row["gpu"], f"{int(row['micro_batch']):,}", *cells)))
    return lines


def with_flash3(operations: Mapping[Operation, int], setup: Setup, gpu: Gpu) -> str:
    """A table's line: the student's step on a Hopper GPU with flash-attn 2 → with FlashAttention 3."""
    found = []
    for version in (2, 3):
        this = replace(gpu, flash_attention=version)
        phases = predict(operations, setup, this)
        found.append((f"{student_seconds(phases) * 1e3:.1f}", f"{mfu(phases, setup, this):.3f}"))
    return table_line((gpu.name, f"{setup.largest:,}", *(f"{old} → {new}" for old, new in zip(*found, strict=True))))


def main(names: Sequence[str], out: Path | None = None) -> None:
    """Trace a step of each size in this process, which then believes in a GPU; print, and write below `out`."""
    from .fake_cuda.device import install
    from .fake_cuda.step import Case, run_step

    install()
    text = ["# Roofline of the whole step: Qwen3-1.7B student, Qwen3-8B teacher", INTRO, ASSUMPTIONS]
    table, flash3 = [], [table_line(("GPU", "micro-batch", "ms", "mfu")), table_line(["---"] * 4)]
    for tokens in MICROBATCH_TOKENS:
        step = run_step(Case(microbatch_tokens=tokens))
        setup = setup_of(step.batch.micro_batches, step.arch, step.teacher_arch)
        for name in names:
            text.append(report(step.trace.operations, setup, GPUS[name]))
            table += rows(step.trace.operations, setup, GPUS[name])
            if GPUS[name].capability == 90:
                flash3.append(with_flash3(step.trace.operations, setup, GPUS[name]))
    before = read_rows(RESULTS / "step-before.csv")
    text.insert(3, "\n".join(["## Before and after", "", BEFORE, "", *compared(before, table)]))
    text.insert(4, "\n".join(["## With FlashAttention 3", "", FLASH3, "", *flash3]))
    print("\n\n".join(text))
    if out is not None:
        (out / "STEP.md").write_text("\n\n".join(text) + "\n")
        with (out / "step.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


INTRO = """\
`python -m benchmarks.roofline --step --out benchmarks/results`. A prediction from the operations that run on fake CUDA
tensors, 16 responses of about 1,500 tokens to two prompts: no GPU has measured anything here."""
BEFORE = """\
The student's step at commit 9429b30 (step-before.csv: liger-kernel's norms and rope, Megatron's layer) → now."""
FLASH3 = f"""\
Where `flash_attn_interface` is installed, at {step_costs.FLASH3:g} times the rates of flash-attn 2 both ways: the lower
ends of its paper's 1.5 to 2.0 (forward) and 1.5 to 1.75 (backward); its scratch as that of flash-attn 2."""
