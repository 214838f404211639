"""A training step of the real student with random weights: time, MFU, and peak memory beside `vold plan`'s count.

The models and the batch are those of benchmarks/train_step.py; rows go into train_step-cuda.csv. Two sizes of a
micro-batch: 3.2k tokens, where launching kernels is the limit, and 12k. What the host waits for in a step is counted,
and the same step twice from the same state gives the same bits, or the check says that it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks import train_step
from benchmarks.train_step import COLUMNS, LOGITS, OURS, Step, build, measure, row
from vold.models.layer_ops import layer_ops
from vold.parallel.launch import Layout, initialise

from .numerics import FILE as CHECKS
from .numerics import host_waits
from .part import CHECK_COLUMNS, MIB, Context, Item, check

SHAPES = ((3200, 4), (12000, 8))  # tokens, sequences of a micro-batch
PLAN_TOLERANCE = 0.1
"""A plan leaves a tenth of the memory free."""
HOST_WAITS = 4 + 2
"""Of a micro-batch forward and backward, and of an update (docs/gpu.md)."""


def items(context: Context) -> list[Item]:
    if context.dry_run:
        return [_item(48, 2, 1 / 32, teacher=teacher, seconds=3) for teacher in (False, True)]
    short, long = SHAPES
    steps = [_item(*shape, 1, teacher=False, seconds=25) for shape in (long, short)]
    return [*steps, _item(*long, 1, teacher=True, seconds=40)]


def _item(tokens: int, sequences: int, scale: float, *, teacher: bool, seconds: float) -> Item:
    arguments = {"tokens": tokens, "sequences": sequences, "scale": scale, "no_teacher": not teacher}
    title = f"{tokens} tokens" + (" with the 8B teacher" if teacher else "")
    return Item(title, lambda context: _measure(context, title, arguments), seconds)


def _measure(context: Context, title: str, arguments: dict) -> None:
    on_cuda = context.device.type == "cuda"
    options = argparse.Namespace(**arguments, dtype="bfloat16" if on_cuda else "float32", runs=5 if on_cuda else 1)
    planning = _start_plan(options) if options.no_teacher else None
    layout = initialise(1, 1, seed=0)
    providers = [OURS, LOGITS] if options.no_teacher else [OURS]  # 12k tokens of fp32 logits, several times, fit too
    step = build(options, layout, getattr(torch, options.dtype))
    results = measure(step, providers, layout.device, options.runs)
    rows = [row(name, result, step, options, layout) for name, result in results.items()]
    context.write(f"train_step-{layout.device.type}.csv", rows, COLUMNS)
    context.write(CHECKS, _waits(context, title, step), CHECK_COLUMNS)
    if planning is not None:
        context.write(CHECKS, _beside_plan(context, title, results[OURS], _finish_plan(planning)), CHECK_COLUMNS)


def _waits(context: Context, title: str, step: Step) -> Iterator[dict]:
    with host_waits(context.device) as waits:
        step.run(OURS)
    micro_batches = len(step.batch.micro_batches)
    counted = [f"{waits.count(place)} × {place}" for place in sorted(set(waits))]
    yield check(f"host waits of a step of {title}", len(waits), HOST_WAITS * micro_batches, "; ".join(counted))


def _beside_plan(context: Context, title: str, result: dict, planned: dict) -> Iterator[dict]:
    layers = layer_ops(context.device.type, torch.bfloat16)
    for name in ("resident", "peak"):
        measured, plan = result[name] / MIB, planned[name] / MIB
        note = f"measured {measured:.0f} MiB, planned {plan:.0f} with {planned['layers']}; here {layers}"
        row = check(f"{name} memory over the plan, {title}", measured / plan - 1, PLAN_TOLERANCE, note)
        # A CPU's numbers are of the whole process, Python and its libraries included.
        yield row | ({} if context.device.type == "cuda" else {"passed": "skipped"})


# -- the plan ------------------------------------------------------------------------------------------------------


def _start_plan(options: argparse.Namespace) -> subprocess.Popen:
    """What `vold plan` counts, in a process that sees no GPU, while this one measures: bytes resident between steps
    and, beyond that, at the peak."""
    arguments = [str(options.tokens), str(options.sequences), str(options.scale), options.dtype]
    command = [sys.executable, "-m", "benchmarks.gpu_day.train", *arguments]
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish_plan(planning: subprocess.Popen) -> dict:
    output, _ = planning.communicate(timeout=60)
    last = (output.splitlines() or ["no output"])[-1]
    if planning.returncode:
        raise RuntimeError(f"the plan failed: {last}")
    return json.loads(last)


def plan(tokens: int, sequences: int, scale: float, dtype: torch.dtype) -> dict:
    from vold.models.architecture import Architecture
    from vold.models.language_model import build_chunks
    from vold.parallel.launch import fake_layout, shutdown
    from vold.planning.meta_memory import packed_on_meta, training_peak, training_state_bytes, update_bytes

    length = tokens // sequences
    arch = Architecture.from_config(train_step.student_config(scale))
    layout: Layout = fake_layout(0, 1, tp=1, pp=1)
    try:
        with torch.device("meta"):
            chunks = build_chunks(arch, layout, dtype)
        counts = [parameter.numel() for parameter in chunks[0].parameters()]
        packed, losses = packed_on_meta(length * sequences, length // 5, length - length // 5, 1)
        train = training_peak(chunks, packed, losses, micro_batches=1, device="cuda")
    finally:
        shutdown()
    update = update_bytes(sum(counts), max(counts), "cuda")
    resident = sum(training_state_bytes(sum(counts), layout, dtype).values())
    return {
        "resident": resident,
        "peak": max(train.activations + train.working, update),
        "layers": "Liger's layers and flash-attn",
    }


if __name__ == "__main__":
    print(json.dumps(plan(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), getattr(torch, sys.argv[4]))))
