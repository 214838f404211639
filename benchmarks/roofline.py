"""Predicts the time of a head on a GPU, phase by phase, from FLOPs, bytes and instructions. Nothing here is measured.

    python -m benchmarks.roofline                                       both heads, 8192 tokens, A100, H100 and H200
    python -m benchmarks.roofline --gpu h200 --shape 32768 2048 151936  one head, forward and backward
    python -m benchmarks.roofline --step                                the whole training step (step_roofline.py)

Prints each design's phases, then all designs beside the floor: 6NDV (forward only: 2NDV) at the rate of a large matmul.
The measured time stands beside it where results/kernels-cuda.csv has that GPU and shape. `ASSUMPTIONS` is printed too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from vold.planning.gpu_specs import GPU_SPECS
from vold_kernels import waves
from vold_kernels.chunks import ChunkBudget, default_budget, slices

from .harness import read_rows, table_line
from .problem import LOGPROB, POLICY_LOSS
from .providers import OURS

RESULTS = Path(__file__).parent / "results"
HEADS = {"student": (POLICY_LOSS, 2048), "teacher": (LOGPROB, 4096)}
VOCAB = 151936
HIDDEN_SHARE = 0.5
ISSUE_SHARE = 0.7
SM_BANDWIDTH = 80e9
ASSUMPTIONS = f"""\
- A matmul runs at the GPU's matmul rate below, in whole waves of {waves.BLOCK_ROWS} × {waves.BLOCK_COLUMNS} blocks on
  its SMs. Its reads are hidden under its arithmetic; of the logits that it writes, and of dW in fp32 that it reads and
  writes, {HIDDEN_SHARE:.0%} is.
- A row kernel alone takes the longer of its bytes at the memory rate and of its instructions (aot.csv) at
  {ISSUE_SHARE:.0%} of the issue rate. Under a matmul it takes those SMs away for the longer of its bytes at
  {SM_BANDWIDTH / 1e9:.0f} GB/s an SM (64 KiB in flight over 0.8 µs) and of its instructions. With a single chunk (tile)
  there is no matmul to run under.
- Left out: launches, the reduction over ranks, the loss of each token."""


@dataclass(frozen=True)
class Gpu:
    """Rates that kernels reach, not those of the data sheet."""

    name: str
    matmul: float
    """FLOP/s of a large bf16 matmul."""
    bandwidth: float
    """bytes/s."""
    sms: int
    issue: float
    """Instructions of one thread a second: SMs · 128 · clock."""
    capability: int
    """Of the row in aot.csv."""
    flash_attention: int = 2
    """Version that is installed; 3 knows Hopper alone."""


def _gpu(name: str, spec: str, reached: tuple[float, float], sms: int, clock: float, capability: int) -> Gpu:
    """reached: (share of the data sheet's FLOP/s, of its bytes/s)."""
    flops, bandwidth = GPU_SPECS[spec].flops * reached[0], GPU_SPECS[spec].bandwidth * reached[1]
    return Gpu(name, flops, bandwidth, sms, sms * 128 * clock, capability)


GPUS = {
    "a100": _gpu("A100", "a100-80g", (0.85, 0.86), 108, 1.41e9, 80),
    "h100": _gpu("H100", "h100-80g", (0.80, 0.90), 132, 1.74e9, 90),
    "h200": _gpu("H200", "h200", (0.80, 0.90), 132, 1.74e9, 90),
}
"""Shares published for large matmuls and copies; assumed here."""


@dataclass(frozen=True)
class Design:
    """How the head is scheduled."""

    name: str
    budget: ChunkBudget
    lanes: int
    whole_waves: bool

    @property
    def itemsize(self) -> int:
        """Bytes of a logit."""
        return 2 if self.budget.bf16_logits else 4


_BEFORE = ChunkBudget(2 << 30)
_NOW = default_budget(torch.device("cuda"))
DESIGNS = (
    Design("before: one lane", _BEFORE, 1, False),
    Design("one lane, whole waves", _NOW, 1, True),
    Design("two lanes (default)", _NOW, 2, True),
    Design("two lanes, memory short", replace(_NOW, resident_bytes=5 << 29, tile_bytes=3 << 27), 2, True),
    Design("two lanes, bf16 logits", replace(_NOW, bf16_logits=True), 2, True),
)


@dataclass(frozen=True)
class Phase:
    name: str
    flops: float
    bytes: float
    seconds: float


def floor_seconds(shape: waves.HeadShape, mode: str, gpu: Gpu) -> float:
    """The matmuls of the mode alone, at the GPU's matmul rate."""
    return (2 if mode == LOGPROB else 6) * shape.tokens * shape.hidden * shape.rows / gpu.matmul


def sizes(shape: waves.HeadShape, mode: str, design: Design, gpu: Gpu) -> tuple[int, int]:
    """(tokens, columns) of a chunk, or of a tile where there is no gradient."""
    budget, lanes, item = design.budget, design.lanes, design.itemsize
    if mode == LOGPROB and design.whole_waves:
        limits = (budget.max_tokens, budget.tile_columns)
        return waves.tile(shape, budget.tile_bytes // lanes // item, limits, gpu.sms) or budget.tile(shape.rows, item)
    if mode == LOGPROB:
        return budget.tile(shape.rows, item)
    most = min(budget.resident_bytes // lanes // (shape.rows * item), budget.max_tokens)
    by_waves = waves.resident_tokens(shape, most, gpu.sms) if design.whole_waves else None
    return by_waves or budget.resident_tokens(shape.rows, item, shape.tokens), shape.rows


def phases(shape: waves.HeadShape, mode: str, design: Design, gpu: Gpu) -> list[Phase]:
    """Every phase over all tokens."""
    tokens, columns = sizes(shape, mode, design, gpu)
    chunks, tiles = _lengths(shape.tokens, tokens), _lengths(shape.rows, columns)
    logits, item = shape.tokens * shape.rows, design.itemsize
    under_matmul = design.lanes > 1 and len(chunks) * len(tiles) > 1
    pieces = [(chunk, tile, shape.hidden) for chunk in chunks for tile in tiles]
    reads = 2 * shape.hidden * sum(chunk + tile for chunk, tile, _ in pieces)
    forward = [
        _matmul("logits", pieces, reads, item * logits, gpu),
        _row_kernel("fold", logits, item, under_matmul, _instructions("fold_kernel", item, gpu.capability), gpu),
    ]
    if mode == LOGPROB:
        return forward
    instructions = _instructions("dlogits_kernel", item, gpu.capability)
    weight = shape.rows * shape.hidden
    hidden = shape.tokens * shape.hidden
    return [
        *forward,
        _row_kernel("dlogits", logits, item + 2, under_matmul, instructions, gpu),
        _matmul(
            "dH", [(c, shape.hidden, shape.rows) for c in chunks], 2 * (logits + len(chunks) * weight), 4 * hidden, gpu
        ),
        _matmul(
            "dW", [(shape.rows, shape.hidden, c) for c in chunks], 2 * (logits + hidden), 8 * len(chunks) * weight, gpu
        ),
    ]


def _lengths(total: int, step: int) -> list[int]:
    return [part.stop - part.start for part in slices(total, step)]


def _matmul(
    name: str, shapes: list[tuple[int, int, int]], hidden_bytes: int, half_hidden_bytes: int, gpu: Gpu
) -> Phase:
    """Matmuls of these (rows, columns, depth)."""
    flops = sum(2 * rows * columns * depth for rows, columns, depth in shapes)
    block = 2 * waves.BLOCK_ROWS * waves.BLOCK_COLUMNS * gpu.sms
    in_waves = sum(block * waves.waves(rows, columns, gpu.sms) * depth for rows, columns, depth in shapes)
    seconds = in_waves / gpu.matmul + (1 - HIDDEN_SHARE) * half_hidden_bytes / gpu.bandwidth
    return Phase(name, flops, hidden_bytes + half_hidden_bytes, seconds)


def _row_kernel(
    name: str, logits: int, bytes_per_logit: int, under_matmul: bool, instructions: float, gpu: Gpu
) -> Phase:
    total = logits * bytes_per_logit
    rate = gpu.sms * SM_BANDWIDTH if under_matmul else gpu.bandwidth
    return Phase(name, 0, total, max(total / rate, logits * instructions / (ISSUE_SHARE * gpu.issue)))


@cache
def _instructions(kernel: str, itemsize: int, capability: int) -> float:
    """Instructions per logit, counted from the binary."""
    variant = {4: "fp32", 2: "bf16"}[itemsize] + (" to bf16" if kernel == "dlogits_kernel" else "")
    rows = read_rows(RESULTS / "aot.csv")
    keys = {"kernel": kernel, "variant": variant, "sm": str(capability)}
    return next(float(r["instructions_per_logit"]) for r in rows if all(r[k] == v for k, v in keys.items()))


def measured(shape: waves.HeadShape, mode: str, gpu: Gpu) -> str:
    """The median of `make bench` on this GPU and shape."""
    path = RESULTS / "kernels-cuda.csv"
    keys = {"mode": mode, "provider": OURS, "status": "measured"}
    keys |= {"tokens": str(shape.tokens), "hidden": str(shape.hidden), "vocab": str(shape.rows)}
    for row in read_rows(path) if path.exists() else []:
        if gpu.name in row["device"] and all(row[k] == v for k, v in keys.items()):
            return f"{float(row['median_s']) * 1e3:.2f} ms at commit {row['commit']}"
    return "not measured"


def report(shape: waves.HeadShape, mode: str, gpu: Gpu) -> str:
    """Markdown tables of one head on one GPU."""
    floor = floor_seconds(shape, mode, gpu)
    task = "log-probs, forward" if mode == LOGPROB else "policy loss, forward and backward"
    title = f"## {gpu.name}, {task}: N {shape.tokens}, D {shape.hidden}, V {shape.rows}"
    rates = f"{gpu.matmul / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.sms} SMs"
    intro = f"Floor {floor * 1e3:.2f} ms ({rates}). Measured: {measured(shape, mode, gpu)}."
    summary = [table_line(("design", "chunk or tile", "predicted ms", "× floor")), table_line(["---"] * 4)]
    detail = [table_line(("design", "phase", "TFLOP", "GB", "predicted ms")), table_line(["---"] * 5)]
    for design in DESIGNS:
        parts = phases(shape, mode, design, gpu)
        total = sum(phase.seconds for phase in parts)
        size = "{} × {}".format(*sizes(shape, mode, design, gpu))
        summary.append(table_line((design.name, size, f"{total * 1e3:.2f}", f"{total / floor:.3f}")))
        for p in parts:
            cells = (p.name, f"{p.flops / 1e12:.2f}", f"{p.bytes / 1e9:.2f}", f"{p.seconds * 1e3:.2f}")
            detail.append(table_line((design.name, *cells)))
    return "\n".join([title, "", intro, "", *summary, "", *detail])


def main() -> None:
    options = _options()
    if options.step:
        from . import step_roofline  # which reads this file

        return step_roofline.main(options.gpu, options.out)
    if options.shape:
        tokens, hidden, rows = options.shape
        heads = [(mode, waves.HeadShape(tokens, hidden, rows)) for mode in (POLICY_LOSS, LOGPROB)]
    else:
        heads = [(mode, waves.HeadShape(options.tokens, hidden, VOCAB)) for mode, hidden in HEADS.values()]
    reports = [report(shape, mode, GPUS[name]) for mode, shape in heads for name in options.gpu]
    heading = "# Roofline of the heads\n\n`python -m benchmarks.roofline`. A prediction: nothing here is measured."
    text = "\n\n".join([heading, ASSUMPTIONS, *reports]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="*", choices=GPUS, default=list(GPUS))
    parser.add_argument("--tokens", type=int, default=8192, help="of the student's and the teacher's head")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), help="another head, both ways")
    parser.add_argument("--step", action="store_true", help="the whole step, traced on fake CUDA tensors")
    parser.add_argument("--out", type=Path, help="also write the text to this file; with --step, to this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
