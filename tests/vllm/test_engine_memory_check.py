"""vLLM's own check at start accepts the share that it is told, where its default would refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from vold.config.schema import VllmConfig
from vold.rollout.vllm.engines import CONTEXT_BYTES, GIB, memory_share

pytestmark = pytest.mark.vllm
H200 = 143771 << 20


@pytest.mark.parametrize("free_gib", [12.5, 40.0, 71.3, 130.0])
def test_request_memory(free_gib):
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    free = int(free_gib * GIB)
    seen = SimpleNamespace(device_="cuda:0", total_memory=H200, free_memory=free - CONTEXT_BYTES)  # context open
    share = memory_share(free, H200, 2 * GIB, VllmConfig())
    assert request_memory(seen, CacheConfig(gpu_memory_utilization=share)) <= seen.free_memory
    if free_gib < 100:
        with pytest.raises(ValueError, match="GPU memory utilization"):
            request_memory(seen, CacheConfig())
