"""Body of test_fake_step.py: a step of each case on the fake device, in a process of its own; prints a line of each
with what the tests compare."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks import step_roofline
from benchmarks.fake_cuda.device import install
from benchmarks.fake_cuda.models import MODELS, config_of
from benchmarks.fake_cuda.step import Case, Step, make_batch, run_step
from benchmarks.fake_cuda.trace import Trace
from benchmarks.gpu_day.fake import run_items
from benchmarks.gpu_day.journal import read_rows
from benchmarks.roofline import GPUS
from vold.models.architecture import Architecture
from vold.models.flops import segment_flops
from vold.models.language_model import build_chunks
from vold.parallel import cpu
from vold.parallel.launch import fake_layout, shutdown
from vold.planning.meta_memory import head_bytes, run_micro_batch, training_state_bytes
from vold_kernels.waves import HeadShape

CASES = {
    "text": Case(student="qwen3-1.7b", teacher="qwen3-8b", offload=True),
    # Two images, of two of the 36 text layers and the first 8 of the tower's 32 blocks: 7 by windows, 1 that reads all.
    "images": Case(
        student="qwen2.5-vl-3b",
        teacher=None,
        preset="grpo",
        responses=4,
        image_patches=(40, 40),
        layers=2,
        blocks=8,
    ),
    "deterministic": Case(teacher=None, preset="grpo", prompts=1, layers=1, deterministic=True),
}
PHASES = ("build", "build_teacher", "teacher", "student_forward", "student_backward", "optimizer", "step", "export")


def facts_of(step: Step) -> dict:
    trace = step.trace
    return {
        "branches": step.branches,
        "parameters": step.parameters,
        "published_parameters": MODELS[step.case.student][2],
        "exported": {name: list(size) for name, size in step.exported.items()},
        "transformers": transformers_tensors(step.case),
        "issues": dict(trace.issues),
        "waits": {phase: trace.waits_by_site(phase) for phase in PHASES},
        "micro_batches": len(step.batch.micro_batches),
        "operations": sum(trace.operations.values()),
        "attention": attention(trace),
        "launches": launches(trace),
        "gemms": sorted({gemm_types(op) for op in trace.select("aten") if op.flops}),
        "collectives": collectives(trace),
        "peaks": {phase: trace.peaks[phase] for phase in PHASES},
        "flops": flops(step),
        "predicted": predicted(step),
        "adamw": adamw(trace),
        "tower": {} if step.case.image_patches is None else tower(trace),
    }


def transformers_tensors(case: Case) -> dict[str, list[int]]:
    """Names and sizes of the text model's tensors in transformers' own class of the student."""
    config = config_of(case.student, case.layers, case.blocks)
    auto = AutoModelForCausalLM if config is config.get_text_config() else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    return {name: list(x.shape) for name, x in model.state_dict().items() if "visual." not in name}


def tower(trace: Trace) -> dict:
    """The tower's products, in the order of the widths, and where its output goes."""
    products: Counter[str] = Counter()
    for op, count in trace.select("aten", site="vision.py:encode").items():
        if op.flops:
            a, b = op.inputs[-2:]
            products[f"{op.name} {list(a.size)} {list(b.size)} -> {op.outputs[0].dtype} {op.outputs[0].device}"] += (
                count
            )
    [insertion] = trace.select("aten", name="index_copy", site="language_model.py:_hidden_states")
    return {
        "products": dict(products),
        "launches": sum(n for op, n in trace.select("aten", site="vision.py").items() if not op.is_free),
        "insertion": [f"{x.dtype} {x.device} {list(x.size)}" for x in insertion.inputs],
    }


def attention(trace: Trace) -> dict[str, int]:
    """ "phase: name dtype [heads, keys' heads, width]" -> calls."""
    found: Counter[str] = Counter()
    for op, count in trace.select("attention").items():
        q, k, v = op.inputs[-4:-1] if "backward" in op.name else op.inputs[:3]
        assert all(x.device == "cuda" and x.stride[-1] == 1 for x in (q, k, v)) and op.segments
        found[f"{op.phase}: {op.name} {q.dtype} {[*q.size[1:2], *k.size[1:]]}"] += count
    return dict(found)


def launches(trace: Trace) -> dict[str, list[str]]:
    """Kernel -> the dtypes of its pointers, each way it was launched."""
    found: dict[str, set[str]] = {}
    for op in trace.select("triton"):
        assert all(x.device == "cuda" for x in op.inputs)
        assert all(x.stride[-1] == 1 for x in op.inputs if x.size and x.size[-1] > 1), op
        found.setdefault(op.name, set()).add(" ".join(x.dtype for x in op.inputs))
    return {name: sorted(ways) for name, ways in found.items()}


def gemm_types(op) -> str:
    a = op.inputs[0 if op.name.split(".")[0] in ("mm", "bmm") else 1]
    result = (op.outputs or op.written)[0]
    assert all(x.device == "cuda" for x in (*op.inputs, result))
    return f"{op.phase}: {a.dtype} -> {result.dtype}"


def collectives(trace: Trace) -> dict[str, int]:
    found: Counter[str] = Counter()
    for op, count in trace.select("collective").items():
        found[f"{op.phase}: {op.name}, {op.site}"] += count
    return dict(found)


def flops(step: Step) -> dict[str, float]:
    """What the trace counted, beside the formulas. The teacher reads tokens with a KL weight alone."""
    trace, arch, teacher = step.trace, step.arch, step.teacher_arch
    scored = sum(int((micro.kl_weight_N != 0).sum()) for micro in step.batch.micro_batches)
    shapes = [
        shape
        for micro in step.batch.micro_batches
        for shape in zip(
            micro.tokens.cu_seqlens.diff().tolist(), micro.tokens.cu_seqlens_k.diff().tolist(), strict=True
        )
    ]
    products = ("student_forward", "student_backward")
    attention = sum(op.flops * n for phase in products for op, n in trace.select("attention", phase=phase).items())
    found = {
        "head": trace.flops(phase="student_forward", site="kernels/"),
        "6NDV": 6 * step.targets * arch.hidden * arch.vocab,
        "student": sum(trace.flops(phase=phase) for phase in products) + attention,
        "useful": sum(segment_flops(arch, *shape) for shape in shapes),
    }
    if teacher is not None:
        found["teacher_head"] = trace.flops(phase="teacher", site="kernels/")
        found["2nEV"] = 2 * scored * teacher.hidden * teacher.vocab
    return found


def adamw(trace: Trace) -> dict[str, int]:
    """Operations of the update itself that launch something -> how often."""
    found: Counter[str] = Counter()
    for op, count in trace.select("aten", phase="optimizer", site="step_with_ready_grads").items():
        found[op.name] += count * (not op.is_free)
    return dict(+found)


def predicted(step: Step) -> list[dict[str, str]]:
    """Rows of benchmarks/results/step.csv that this step would give for an H200."""
    setup = step_roofline.setup_of(step.batch.micro_batches, step.arch, step.teacher_arch)
    return step_roofline.rows(step.trace.operations, setup, GPUS["h200"])


def planned_peak(case: Case) -> int:
    """Bytes that the planner expects of a forward and backward pass of the first step, before Adam has moments."""
    layout = fake_layout(0, case.world, tp=case.tp, pp=1, sp=case.sp)
    arch = Architecture.from_config(config_of(case.student))
    micro_batches = make_batch(case, arch).micro_batches
    tokens, losses = max(
        ((m.tokens, len(m.target_N)) for m in micro_batches), key=lambda pair: len(pair[0].input_ids_T)
    )
    with torch.device("meta"):
        [chunk] = build_chunks(arch, layout, torch.bfloat16)
    meta = {name: getattr(tokens, name) for name in ("input_ids_T", "position_ids_3T", "kv_index_K")}
    meta = {name: None if x is None else x.to("meta") for name, x in meta.items()}
    parameters = sum(parameter.numel() for parameter in chunk.parameters())
    state = sum(training_state_bytes(parameters, layout, torch.bfloat16).values()) - 8 * parameters
    passes = run_micro_batch(chunk, replace(tokens, **meta, pictures=()), device="cuda", train=True)
    shape = HeadShape(losses, arch.hidden, chunk.head_weight().shape[0])
    head = head_bytes(shape, torch.bfloat16, "cuda", ranks=case.tp)
    shutdown()
    return int(state + max(passes.peak, passes.kept + head))


def gpu_day() -> dict:
    """The rows that the train part of `make gpu-day` writes, of one layer of each model."""
    with tempfile.TemporaryDirectory() as folder:
        items = run_items(Path(folder), layers=1)
        return {"items": items} | {file.stem: read_rows(file) for file in Path(folder).glob("*.csv")}


def main(*names: str) -> None:
    whole = [name for name, case in CASES.items() if name in names and case.layers is None]
    planned = {name: planned_peak(CASES[name]) for name in whole}
    with cpu.paused():  # the planner has installed it
        install()
        for name in names:
            found = gpu_day() if name == "gpu_day" else facts_of(run_step(CASES[name]))
            print(json.dumps({"case": name, "planned_peak": planned.get(name)} | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
