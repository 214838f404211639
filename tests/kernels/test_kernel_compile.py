"""Every Triton kernel compiles for A100 and H200 on a machine without either, fits (shared memory, no spills), and
spends on a logit what memory allows: see `benchmarks/aot.py`."""

import pytest
from kernel_cases import INTERPRETED

from benchmarks import aot

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")


BUDGET = {
    "fold_kernel": 11,
    "dlogits_kernel": 8.5,
    "dlogits_kernel, entropy": 12.5,
    "divergence_kernel": 12,
    "divergence_kernel, jsd": 55,  # two exact logarithms a column
    "divergence_dlogits_kernel": 14.5,
    "divergence_dlogits_kernel, jsd": 52,
    "qkv_forward_kernel": 17,
    "qkv_backward_kernel": 21,
    "qkv_backward_kernel, shared": 39,  # four copies of a loop that most tokens skip
    "add_norm_forward_kernel": 18,
    "add_norm_backward_kernel": 23,
}
"""Instructions of the loop per logit (of a layer's kernel per column), in fp32 and bf16 (fp64 is for tests)."""
REDUCED = {"add_norm_forward_kernel": 2, "add_norm_backward_kernel": 3}
"""A layer's kernel -> barriers for a row, whose sum crosses warps."""


@pytest.mark.parametrize("sm", aot.CHIPS)
@pytest.mark.parametrize("variant", aot.VARIANTS, ids=lambda variant: f"{variant.kernel}: {variant.name}")
def test_compiles(variant: aot.Variant, sm: int):
    kernel = aot.compiled(variant, sm)
    assert kernel.metadata.shared <= aot.SHARED_LIMIT[sm]
    is_of_layer = variant.module in (aot.QKV_TRITON, aot.ADD_NORM_TRITON)
    assert is_of_layer or "bar.sync" in kernel.asm["ptx"], "a row is read as a whole before its storage is written"
    usage = aot.usage(kernel, variant)
    if usage is None:
        return
    assert usage.registers <= (128 if is_of_layer else 255) and usage.spill_bytes == 0, usage
    assert usage.stack_bytes <= 8 * is_of_layer, "ptxas keeps to 40 registers and one pair of them lies on the stack"
    if is_of_layer:
        assert usage.barriers_per_block == REDUCED.get(variant.kernel, 0)
    else:
        assert usage.barriers_per_block == ("dlogits" in variant.kernel), "fold and divergence reduce over threads once"
    if "fp64" not in variant.name:
        assert usage.load_bits == 128 or (usage.load_bits == 64 and "qkv" in variant.kernel), "four of a key's columns"
        assert usage.instructions_per_logit <= BUDGET[variant.kernel + special(variant)], usage


def special(variant: aot.Variant) -> str:
    names = ("entropy", "jsd", *(["shared"] if variant.kernel == "qkv_backward_kernel" else []))
    return next((f", {name}" for name in names if name in variant.name), "")


def test_every_kernel_is_listed():
    assert set(aot.kernels()) == {(variant.module, variant.kernel) for variant in aot.VARIANTS}
