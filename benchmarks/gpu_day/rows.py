"""Bandwidth of the row kernels at the real vocabulary and of a layer's kernels at the students' widths, beside a plain
copy in the same run: the roofline's third axis.

Bytes: fold reads a logit once; the gradient reads it and writes it in bf16 (or fp32) over it. A layer's kernels pass
each of their large tensors once.
"""

from __future__ import annotations

import torch

from vold_kernels.add_norm import add_rms_norm
from vold_kernels.qkv import Heads, qkv_norm_rope
from vold_kernels.rows import row_functions, uses_triton
from vold_kernels.softmax import SoftmaxStatistics, dlogits_storage, empty_statistics

from .gemm import COLUMNS, FILE, VOCAB, rate, timed
from .part import Context, Item

TOKENS = 3456
LAYER = 12061, 2048, Heads(16, 8, 128, eps=1e-6)
"""Tokens, width and heads of Qwen3-1.7B's layer."""


def items(context: Context) -> list[Item]:
    tokens, vocab = (8, 4100) if context.dry_run else (TOKENS, VOCAB)
    logits = [
        Item(f"{name} logits", lambda c, d=dtype, n=name: _kernels(c, tokens, vocab, d, n))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    layer = (4, 32, Heads(4, 2, 16, eps=1e-6)) if context.dry_run else LAYER
    return [*logits, Item("layer", lambda c: _layer(c, *layer))]


def _kernels(context: Context, tokens: int, vocab: int, dtype: torch.dtype, name: str) -> None:
    device, functions = context.device, row_functions(context.device)
    if dtype == torch.bfloat16 and not uses_triton(device):
        return  # a dry run without Triton's interpreter: plain torch stores fp32 logits only
    z_CU = torch.randn(tokens, vocab, device=device).to(dtype)
    target_C = torch.randint(vocab, (tokens,), device=device)
    real_columns = torch.tensor(vocab - 267, device=device)
    d_logp_C = torch.randn(tokens, device=device)
    folded_4C = empty_statistics(tokens, z_CU, torch.float32)
    shape, logits = (tokens, "", vocab), tokens * vocab

    fold = timed(lambda: functions.fold_(folded_4C, z_CU, target_C, real_columns, 0), device)
    max_C, sum_C = folded_4C[0].contiguous(), folded_4C[1].contiguous()
    statistics = SoftmaxStatistics(max_C, sum_C.log(), -torch.ones_like(max_C), torch.ones_like(max_C))
    rows = [rate("fold", fold, shape, name, moved=logits * dtype.itemsize)]
    stores = {torch.bfloat16} | ({torch.float32} if dtype == torch.float32 else set())
    for stored in sorted(stores, key=str):
        if device.type == "cpu" and stored != dtype:
            continue  # a CPU writes no narrower dtype over its logits
        dz_CU = dlogits_storage(z_CU, stored)

        def gradient(dz_CU=dz_CU, entropy_C=None):
            functions.dlogits_(dz_CU, z_CU, target_C, real_columns, statistics, d_logp_C, entropy_C)

        moved = logits * (dtype.itemsize + stored.itemsize)
        label = f"{name} to {'bf16' if stored == torch.bfloat16 else 'fp32'}"
        rows.append(rate("dlogits", timed(gradient, device), shape, label, moved=moved))
        with_entropy = timed(lambda g=gradient: g(entropy_C=d_logp_C), device)
        rows.append(rate("dlogits with entropy", with_entropy, shape, label, moved=moved))
    context.write(FILE, rows, COLUMNS)


def _layer(context: Context, tokens: int, width: int, heads: Heads) -> None:
    """The kernel of queries, keys and values and the one of a sum and its norm; both ways."""
    device = context.device
    if not uses_triton(device):
        return  # a CPU's layers are plain torch
    columns = (heads.queries + 2 * heads.keys) * heads.width

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16).requires_grad_()

    x_TD, residual_TD, weight_D = tensor(tokens, width), tensor(tokens, width), tensor(width)
    mixed_TW, norms = tensor(tokens, columns), (tensor(heads.width), tensor(heads.width))
    angles_2TH = torch.randn(2, tokens, heads.width, device=device)
    d_q_TAH, d_k_TKH = (tensor(tokens, count, heads.width).detach() for count in (heads.queries, heads.keys))

    def add_norm():
        return add_rms_norm(x_TD, residual_TD, weight_D, 1e-6)

    def qkv():
        return qkv_norm_rope(mixed_TW, norms, angles_2TH, heads)

    cases = {
        "add + norm": (add_norm, (x_TD.detach(), residual_TD.detach()), 4 * width),
        "q, k, v": (qkv, (d_q_TAH, d_k_TKH, d_k_TKH), 2 * columns),
    }
    rows = []
    for name, (run, gradients, passed) in cases.items():
        outputs = run()
        both = timed(lambda o=outputs, g=gradients: torch.autograd.backward(o, g, retain_graph=True), device)
        for what, found in ((name, timed(run, device)), (f"{name}, backward", both)):
            rows.append(rate(what, found, (tokens, width, columns), "bf16", moved=2 * tokens * passed))
    context.write(FILE, rows, COLUMNS)
