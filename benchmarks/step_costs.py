"""What one operation of a fake-CUDA trace costs on a GPU: kernels, bytes, seconds, and the remedy where it loses time.

Nothing here is measured: the constants are assumptions, and `benchmarks.roofline --step` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vold_kernels import waves

from .fake_cuda.work import Operation, Shape
from .roofline import HIDDEN_SHARE, Gpu, _instructions, _row_kernel

GAP = 2e-6
"""Seconds between two kernels of a stream, charged for every kernel."""
ATTENTION = {80: (185e12, 150e12), 90: (330e12, 270e12)}
"""Compute capability -> FLOP/s of flash-attn 2 forward and backward, causal, heads of 128."""
FLASH3 = 1.5
"""FlashAttention 3 over 2 on Hopper: the lower ends of its paper's 1.5 to 2.0 and 1.5 to 1.75 (arXiv 2407.08608, 1)."""
SORTED_KERNELS = {"embedding_dense_backward": 14, "index_put": 8}
"""Scatters that sort their indices first -> kernels of torch."""
KERNELS = {"flash_attn backward": 6, "nonzero": 3, "linalg_vector_norm": 2, "cumsum": 2}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones_like", "full", "full_like", "new_full", "scalar_tensor"}
FILLS |= {"zero_", "fill_"}
GATHERS = {"embedding", "index", "index_select"}
FOREACH_BLOCK = 320 * 65536  # elements that one launch of torch's multi-tensor kernels takes
FOREACH_LISTS = {"_foreach_lerp_": 2, "_foreach_addcmul_": 3, "_foreach_addcdiv_": 3}


LAYER_KERNELS = ("qkv_", "add_norm_")
"""How the names of our kernels of a layer begin."""
LAYER_SITES = ("kernels/vold_kernels/qkv", "kernels/vold_kernels/add_norm")


def is_of_head(op: Operation) -> bool:
    """True where one of the fused heads made the operation."""
    return op.site.startswith("kernels/") and not op.site.startswith(LAYER_SITES)


def base(op: Operation) -> str:
    """The operation's name without its overload."""
    return op.name.split(".")[0]


def is_first_step(op: Operation) -> bool:
    """True for the allocation of Adam's moments, which only the traced first update does."""
    return op.phase == "optimizer" and base(op) == "zeros_like" and "step_with_ready_grads" in op.site


def kernels(op: Operation) -> int:
    """Kernels that the operation launches."""
    name = base(op)
    if name.startswith(("_foreach", "_fused")):
        elements = sum(math.prod(x.size) for x in _on_device(op.inputs))
        lists = 4 if name.startswith("_fused") else FOREACH_LISTS.get(name, 1)
        return 1 + elements // lists // FOREACH_BLOCK if elements else 0
    return {**KERNELS, **SORTED_KERNELS}.get(name, 1)


def traffic(op: Operation) -> float:
    """Bytes between the device's memory and its processors, each tensor once where the caches hold it."""
    name = base(op)
    inputs, outputs, written = (_bytes(x) for x in (op.inputs, op.outputs, op.written))
    if op.kind == "attention":
        return inputs + outputs + (_attention_scratch(op) if "backward" in op.name else 0)
    if name in FILLS:
        return outputs + written
    if name in GATHERS:
        return 2 * outputs + _bytes(op.inputs[1:])
    if name in SORTED_KERNELS:  # zeros, the gradient, and rows read and written as they are added
        return outputs + 3 * _bytes(op.inputs[-1:] if name == "index_put" else op.inputs[:1])
    if name == "index_copy_":
        return 2 * _bytes(op.inputs[2:]) + _bytes(op.inputs[1:2])
    if name == "copy_" or op.name.endswith(".out"):
        return inputs  # of which the target is one
    if name.startswith("_fused"):  # four lists, of which the gradients are not written
        return inputs * 7 / 4
    if name.startswith("_foreach") and name.endswith("_"):
        return inputs * (1 + 1 / FOREACH_LISTS.get(name, 1))
    return inputs + outputs + written


def seconds(op: Operation, gpu: Gpu, under_matmul: bool) -> float:
    """Of the device. under_matmul: the head's row kernels run on a second stream under a matmul."""
    return kernels(op) * GAP + _busy(op, gpu, under_matmul)


def _busy(op: Operation, gpu: Gpu, under_matmul: bool) -> float:
    moved = traffic(op) / gpu.bandwidth
    if op.kind == "attention":
        rate = ATTENTION[gpu.capability]["backward" in op.name] * (FLASH3 if gpu.flash_attention == 3 else 1.0)
        if "backward" not in op.name:
            return max(op.flops / rate, moved)
        return max(op.flops / rate, moved) + _attention_scratch(op) / gpu.bandwidth
    if op.flops:
        return _matmul(op, gpu, moved)
    if op.name in ("fold_kernel", "dlogits_kernel"):
        logits = max(op.inputs, key=lambda x: x.bytes)
        bytes_per_logit = logits.itemsize + (2 if op.name == "dlogits_kernel" else 0)
        instructions = _instructions(op.name, logits.itemsize, gpu.capability)
        return _row_kernel(op.name, math.prod(logits.size), bytes_per_logit, under_matmul, instructions, gpu).seconds
    return moved


def _matmul(op: Operation, gpu: Gpu, moved: float) -> float:
    """Whole waves of blocks, whichever way they lie; the head's fp32 results are written half under the arithmetic."""
    a, b = [x.size for x in op.inputs[-2:]] if base(op) in ("mm", "bmm") else [x.size for x in op.inputs[1:3]]
    rows, depth, columns = a[-2], a[-1], b[-1]
    batch = math.prod(a[:-2])
    fewest = min(waves.waves(rows, columns, gpu.sms), waves.waves(columns, rows, gpu.sms))
    arithmetic = batch * 2 * waves.BLOCK_ROWS * waves.BLOCK_COLUMNS * gpu.sms * fewest * depth / gpu.matmul
    result = (*op.outputs, *op.written)[0]
    if result.itemsize == 2:
        return max(arithmetic, moved)
    is_head_dw = rows > max(columns, depth)  # of a chunk: its rows are the vocabulary
    accumulates = is_head_dw or op.site.startswith("vold/trainer/weight_gradients.py")
    return arithmetic + (1 - HIDDEN_SHARE) * result.bytes * (2 if accumulates else 1) / gpu.bandwidth


def _attention_scratch(op: Operation) -> int:
    """Bytes of the kernels around flash-attn 2's backward one: dO · O is summed, dQ is zeroed and read in fp32, and dK
    and dV of each query head are summed over the heads that share a key."""
    query, key = op.inputs[1], op.inputs[2]
    per_query_head = key.bytes * query.size[1] // key.size[1]
    shared = 2 * (per_query_head + key.bytes) if query.size[1] != key.size[1] else 0
    return 7 * query.bytes + shared


def _on_device(tensors: Sequence[Shape]) -> list[Shape]:
    return [x for x in tensors if x.device == "cuda"]


def _bytes(tensors: Sequence[Shape]) -> int:
    return sum(x.bytes for x in _on_device(tensors))


# What loses time, and what would help -------------------------------------------------------------------------------

REMEDIES = {
    "attention (flash-attn 2)": "FlashAttention 3 where installed (Hopper)",
    "AdamW": "at the memory's floor: fused, one pass",
    "gradient norm and clipping": "the factor as fused AdamW's `grad_scale`",
    "weights to bf16, gradients to zero": "-",
    "q, k, v: split, norms, rope, shared keys": "at the memory's floor: one kernel",
    "norms and residuals": "at the memory's floor: sum and norm in one kernel",
    "SwiGLU": "at the memory's floor unless fused into the GEMM",
    "dW added to main_grad": "the weight-gradient GEMM straight into `main_grad`",
    "GEMMs of the layers: part waves": "larger packs",
    "head: row kernels, losses": "bf16 logits (`ChunkBudget`)",
    "head: part waves, fp32 results": "bf16 logits (`ChunkBudget`)",
    "embedding": "-",
    "the rest": "-",
}
"""Group of operations -> what would shorten it ("-": nothing planned)."""


def group(op: Operation) -> str:
    """The line of REMEDIES under which the operation is counted."""
    name = base(op)
    if op.kind == "attention":
        return "attention (flash-attn 2)"
    if is_of_head(op):
        return "head: part waves, fp32 results" if op.flops else "head: row kernels, losses"
    if op.flops:
        return "GEMMs of the layers: part waves"
    if op.phase == "optimizer" or name == "zero_":
        return _optimizer_group(op, name)
    if "swiglu" in name:
        return "SwiGLU"
    if "distributed_data_parallel.py:hook" in op.site:
        return "dW added to main_grad"
    if name.startswith("embedding"):
        return "embedding"
    if op.site.startswith(LAYER_SITES[0]) or "SharedKeys" in op.site:
        return "q, k, v: split, norms, rope, shared keys"
    if op.site.startswith(LAYER_SITES[1]):
        return "norms and residuals"
    if name == "cat":
        return "q, k, v: split, norms, rope, shared keys"
    if name in ("add", "add_", "zeros_like", "sum", "_to_copy"):
        return "norms and residuals"
    return "the rest"


def _optimizer_group(op: Operation, name: str) -> str:
    if "step_with_ready_grads" in op.site:
        return "AdamW"
    if name in ("_foreach_norm", "_foreach_mul_"):
        return "gradient norm and clipping"
    return "weights to bf16, gradients to zero" if name in ("copy_", "zero_", "_foreach_copy_") else "the rest"
