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
}
"""Instructions of the loop per logit, in fp32 and bf16 (fp64 is for tests)."""


@pytest.mark.parametrize("sm", aot.CHIPS)
@pytest.mark.parametrize("variant", aot.VARIANTS, ids=lambda variant: f"{variant.kernel}: {variant.name}")
def test_compiles(variant: aot.Variant, sm: int):
    kernel = aot.compiled(variant, sm)
    assert kernel.metadata.shared <= aot.SHARED_LIMIT[sm]
    assert "bar.sync" in kernel.asm["ptx"], "a row is read as a whole before its storage is written"
    usage = aot.usage(kernel)
    if usage is not None:
        assert usage.registers <= 255 and usage.spill_bytes == 0 and usage.stack_bytes == 0, usage
        assert usage.barriers_per_block == ("dlogits" in variant.kernel), "fold and divergence reduce over threads once"
        if "fp64" not in variant.name:
            assert usage.load_bits == 128
            assert usage.instructions_per_logit <= BUDGET[variant.kernel + special(variant.name)], usage


def special(variant: str) -> str:
    return next((f", {name}" for name in ("entropy", "jsd") if name in variant), "")


def test_every_kernel_is_listed():
    assert set(aot.kernels()) == {(variant.module, variant.kernel) for variant in aot.VARIANTS}
