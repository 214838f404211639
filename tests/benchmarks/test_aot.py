"""The ahead-of-time table: one kernel is compiled, every kernel is listed."""

import os

import pytest

from benchmarks import aot

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no binary")


def test_every_listed_variant_names_a_kernel_and_its_arguments():
    launched = set(aot.kernels())
    assert launched
    for variant in aot.VARIANTS:
        assert (variant.module, variant.kernel) in launched


@pytest.mark.parametrize("sm", aot.CHIPS)
def test_usage_is_read_from_the_binary(sm: int):
    kernel = aot.compiled(aot.VARIANTS[0], sm)
    resources = aot.usage(kernel, aot.VARIANTS[0])
    assert kernel.metadata.shared <= aot.SHARED_LIMIT[sm]
    assert resources is None or (
        0 < resources.registers <= 255 and resources.spill_bytes == 0 and resources.ptx_bytes > 1000
    )
