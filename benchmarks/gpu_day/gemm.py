"""The matmuls of a head by themselves, as vold_kernels calls them: what the design's estimates hang on.

bf16 inputs; results in bf16 and in fp32 (`out_dtype`), the weight gradient with and without accumulation, over the
sizes of a chunk. A copy and a square product give the machine's two ceilings. Letters as in vold_kernels/matmuls.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import seconds, spread
from vold_kernels import matmuls

from .part import FACTS, Context, Item

FILE = "rates.csv"
COLUMNS = (
    *("what", "tokens", "hidden", "columns", "stored", "ms", "p20_ms", "p80_ms", "runs", "tflops", "gb_per_s"),
    *FACTS,
)
STUDENT, TEACHER, VOCAB = 2048, 4096, 151936
CHUNKS = (1024, 2048, 3456, 6912)
TILES = ((2048, 8192), (2048, 8448), (8192, 33792))


def items(context: Context) -> list[Item]:
    small = context.dry_run
    chunks, vocab, student, teacher = ((16, 48), 1000, 32, 64) if small else (CHUNKS, VOCAB, STUDENT, TEACHER)
    tiles = ((16, 128), (32, 256)) if small else TILES
    return [
        Item("ceilings", lambda c: _ceilings(c, 256 if small else 8192)),
        Item("student logits, dH, dW by chunk", lambda c: _student(c, chunks, student, vocab)),
        Item("teacher tiles", lambda c: _teacher(c, tiles, teacher)),
    ]


def timed(run: Callable[[], object], device: torch.device, budget: float = 0.7) -> list[float]:
    """Seconds of at least 3 and at most 50 runs, after two untimed ones."""
    for _ in range(2):
        seconds(run, device)
    results, ends = [], time.monotonic() + budget
    while len(results) < 3 or (len(results) < 50 and time.monotonic() < ends):
        results.append(seconds(run, device))
    return results


def rate(what: str, run_seconds: list[float], shape: tuple, stored: str, *, flops: float = 0, moved: float = 0) -> dict:
    """A row; shape: tokens, hidden, columns."""
    median, p20, p80 = spread(run_seconds)
    row = {"what": what, "stored": stored, **dict(zip(("tokens", "hidden", "columns"), shape, strict=True))}
    row |= {"ms": f"{1e3 * median:.4f}", "p20_ms": f"{1e3 * p20:.4f}", "p80_ms": f"{1e3 * p80:.4f}"}
    row |= {"runs": len(run_seconds)}
    row |= {"tflops": f"{flops / median / 1e12:.1f}"} if flops else {}
    return row | ({"gb_per_s": f"{moved / median / 1e9:.0f}"} if moved else {})


def _random(*shape: int, context: Context, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=context.device).to(dtype)


def _ceilings(context: Context, size: int) -> None:
    a, b = (_random(size, size, context=context) for _ in range(2))
    out = torch.empty_like(a)
    product = timed(lambda: torch.mm(a, b, out=out), context.device)
    source = torch.randn(size * size * 16, device=context.device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), context.device)
    rows = [
        rate("square product", product, (size, size, size), "bf16", flops=2.0 * size**3),
        rate("copy", copy, (size * size * 16, "", ""), "fp32", moved=2.0 * source.nbytes),
    ]
    context.write(FILE, rows, COLUMNS)


def _student(context: Context, chunks: tuple[int, ...], hidden: int, vocab: int) -> None:
    weight_VD = _random(vocab, hidden, context=context)
    d_weight_VD = torch.zeros(vocab, hidden, device=context.device)
    for tokens in chunks:
        hidden_CD = _random(tokens, hidden, context=context)
        _logits(context, "student logits", hidden_CD, weight_VD)
        dz_CV = _random(tokens, vocab, context=context)
        d_hidden_CD = torch.empty(tokens, hidden, device=context.device)
        shape, flops = (tokens, hidden, vocab), 2.0 * tokens * hidden * vocab
        if not matmuls.uses_tensor_cores(dz_CV):
            dz_CV = dz_CV.float()

        def d_hidden(out=d_hidden_CD, dz_CV=dz_CV):
            matmuls.hidden_gradient_(out, dz_CV, weight_VD)

        def d_weight(accumulate: bool, dz_CV=dz_CV, hidden_CD=hidden_CD):
            matmuls.weight_gradient_(d_weight_VD, dz_CV, hidden_CD, accumulate=accumulate)

        runs = {"dH": d_hidden, "dW": lambda f=d_weight: f(False), "dW accumulated": lambda f=d_weight: f(True)}
        rows = [rate(name, timed(run, context.device), shape, "fp32", flops=flops) for name, run in runs.items()]
        context.write(FILE, rows, COLUMNS)


def _teacher(context: Context, tiles: tuple[tuple[int, int], ...], hidden: int) -> None:
    for tokens, columns in tiles:
        weight_BD = _random(columns, hidden, context=context)
        _logits(context, "teacher tile", _random(tokens, hidden, context=context), weight_BD)


def _logits(context: Context, what: str, hidden_CD: Tensor, weight_BD: Tensor) -> None:
    """Into bf16 by plain mm, into fp32 and bf16 as vold_kernels does."""
    shape = (*hidden_CD.shape, len(weight_BD))
    flops = 2.0 * hidden_CD.numel() * len(weight_BD)
    rows = []
    for stored in (torch.bfloat16, torch.float32):
        z_CB = torch.empty(len(hidden_CD), len(weight_BD), dtype=stored, device=context.device)
        name = str(stored).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        if stored == torch.bfloat16:
            plain = timed(lambda z=z_CB: torch.mm(hidden_CD, weight_BD.t(), out=z), context.device)
            rows.append(rate(f"{what}, plain mm", plain, shape, name, flops=flops))
        ours = timed(lambda z=z_CB: matmuls.logits_(z, hidden_CD, weight_BD, temperature=0.7), context.device)
        rows.append(rate(what, ours, shape, name, flops=flops))
    context.write(FILE, rows, COLUMNS)
