"""Every Triton kernel compiles for A100 and H200 on a machine without either, and fits: shared memory, no spills."""

import pytest
from kernel_cases import INTERPRETED

from benchmarks import aot

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")


@pytest.mark.parametrize("sm", aot.CHIPS)
@pytest.mark.parametrize("variant", aot.VARIANTS, ids=lambda variant: f"{variant.kernel}: {variant.name}")
def test_compiles(variant: aot.Variant, sm: int):
    kernel = aot.compiled(variant, sm)
    assert kernel.metadata.shared <= aot.SHARED_LIMIT[sm]
    assert "bar.sync" in kernel.asm["ptx"], "a row is read as a whole before its storage is written"
    usage = aot.usage(kernel)
    if usage is not None:
        assert usage.registers <= 255 and usage.spill_bytes == 0 and usage.stack_bytes == 0, usage


def test_every_kernel_is_listed():
    assert set(aot.kernels()) == {(variant.module, variant.kernel) for variant in aot.VARIANTS}
