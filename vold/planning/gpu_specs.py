"""Published memory and peak rates of GPUs, from NVIDIA's data sheets: of the SXM modules, and of the RTX 4090 (Ada
white paper, fp32 accumulation).

Memory as nvidia-smi counts it, dense bf16 matrix multiplication, memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from vold.models.flops import PEAK_FLOPS
from vold.run.timers import GIB

RESERVED = 0.1
"""Share of a GPU's memory left to CUDA, NCCL and fragmentation. Assumed, not measured."""


@dataclass(frozen=True)
class GpuSpec:
    """memory in bytes; flops in FLOP/s; bandwidth in bytes/s."""

    memory: float
    flops: float
    bandwidth: float

    @property
    def usable_memory(self) -> float:
        """Bytes that a plan may fill."""
        return (1 - RESERVED) * self.memory


GPU_SPECS = {
    "rtx4090-24g": GpuSpec(24 * GIB, 165.2e12, 1.008e12),
    "a100-40g": GpuSpec(40 * GIB, PEAK_FLOPS["A100"], 1.555e12),
    "a100-80g": GpuSpec(80 * GIB, PEAK_FLOPS["A100"], 2.039e12),
    "h100-80g": GpuSpec(79.6 * GIB, PEAK_FLOPS["H100"], 3.35e12),
    "h200": GpuSpec(140.4 * GIB, PEAK_FLOPS["H200"], 4.8e12),
}
