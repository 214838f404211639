"""Useful work of a training step, and the share of the machine's peak it amounts to (MFU)."""

from __future__ import annotations

import torch

from vold.models.architecture import Architecture
from vold.types import PackedTokens

# dense bf16 matrix-multiply peak, FLOP/s, by a part of the device's name
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def training_flops(arch: Architecture, tokens: PackedTokens) -> float:
    """Forward and backward over packed tokens: 6 per weight and token, plus causal attention; recomputation and
    padding do not count, and a prompt that responses share counts once."""
    shapes = zip(tokens.cu_seqlens.diff().tolist(), tokens.cu_seqlens_k.diff().tolist(), strict=True)
    return sum(segment_flops(arch, queries, keys) for queries, keys in shapes)


def segment_flops(arch: Architecture, queries: int, keys: int) -> float:
    """Of one segment: linear in its queries for the weights; the last query reads all keys, each before it one less."""
    attention = arch.heads * arch.head_dim
    per_layer = arch.hidden * (2 * attention + 2 * arch.kv_heads * arch.head_dim) + 3 * arch.hidden * arch.ffn
    weights = arch.layers * per_layer + arch.vocab * arch.hidden
    return float(6 * weights * queries + 6 * arch.layers * attention * queries * (2 * keys - queries))


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, or None where it is not in the table (a CPU, another GPU): then no MFU is shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
