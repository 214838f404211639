"""Useful work of a training step, and the share of the machine's peak it amounts to (MFU)."""

from __future__ import annotations

import torch
from torch import Tensor

from vold.models.architecture import Architecture

# dense bf16 matrix-multiply peak, FLOP/s, by a part of the device's name
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def training_flops(arch: Architecture, cu_seqlens: Tensor) -> float:
    """Forward and backward over packed sequences: 6 per weight and token, plus causal attention; recomputation and
    padding do not count."""
    return sum(sequence_flops(arch, length) for length in cu_seqlens.diff().tolist())


def sequence_flops(arch: Architecture, length: int) -> float:
    """Of one sequence: linear in its length for the weights, quadratic for attention."""
    attention = arch.heads * arch.head_dim
    per_layer = arch.hidden * (2 * attention + 2 * arch.kv_heads * arch.head_dim) + 3 * arch.hidden * arch.ffn
    weights = arch.layers * per_layer + arch.vocab * arch.hidden
    return float(6 * weights * length + 6 * arch.layers * attention * length**2)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, or None where it is not in the table (a CPU, another GPU): then no MFU is shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
