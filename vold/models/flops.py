"""Parameters and matrix-multiply work of a language model, by its architecture alone, and the peak rate of a GPU.

All functions that name an architecture count the undivided text model: no vision tower, no parallel division.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vold.models.architecture import Architecture
from vold.types import PackedTokens

# dense bf16 matrix-multiply peak, FLOP/s, by a part of the device's name
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


# Parameters ----------------------------------------------------------------------------------------------------------


def attention_matmul_parameters(arch: Architecture) -> int:
    """Weights of one layer's query, key, value and output projections."""
    return arch.hidden * 2 * (arch.heads + arch.kv_heads) * arch.head_dim


def mlp_matmul_parameters(arch: Architecture) -> int:
    """Weights of one layer's gate, up and down projections."""
    return 3 * arch.hidden * arch.ffn


def layer_matmul_parameters(arch: Architecture) -> int:
    """Weights that one layer multiplies every token with."""
    return attention_matmul_parameters(arch) + mlp_matmul_parameters(arch)


def matmul_parameters(arch: Architecture) -> int:
    """Weights that the model multiplies every token with: all layers and the head (the embedding only looks up)."""
    return arch.layers * layer_matmul_parameters(arch) + arch.vocab * arch.hidden


def layer_parameters(arch: Architecture) -> int:
    """All parameters of one layer: projections, their biases, and norms."""
    biases = arch.qkv_bias * (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    norms = 2 * arch.hidden + arch.qk_norm * 2 * arch.head_dim
    return layer_matmul_parameters(arch) + biases + norms


def language_model_parameters(arch: Architecture) -> int:
    """All parameters of the language model; a tied head counts once."""
    vocabulary = (1 if arch.tied else 2) * arch.vocab * arch.hidden
    return arch.layers * layer_parameters(arch) + arch.hidden + vocabulary


def adapter_parameters(arch: Architecture, rank: int, targets: Sequence[str]) -> int:
    """Parameters of LoRA's update of these targets in all layers: rank * (inputs + outputs) of each projection."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = {
        "qkv": 3 * arch.hidden + queries + 2 * keys,
        "proj": queries + arch.hidden,
        "fc1": 2 * (arch.hidden + arch.ffn),
        "fc2": arch.ffn + arch.hidden,
    }
    return arch.layers * rank * sum(sizes[target] for target in targets)


# Work ----------------------------------------------------------------------------------------------------------------


def training_flops(arch: Architecture, tokens: PackedTokens, has_frozen_weights: bool = False) -> float:
    """FLOPs of forward and backward over packed tokens: 6 per weight and token (4 for frozen ones, whose gradient is
    not computed; adapters are left out), plus causal attention. Recomputation and padding do not count, and a prompt
    that responses share counts once."""
    saved = 2 * matmul_parameters(arch) * sum(queries for queries, _ in tokens.segments) if has_frozen_weights else 0
    return sum(segment_flops(arch, queries, keys) for queries, keys in tokens.segments) - saved


def segment_flops(arch: Architecture, queries: int, keys: int) -> float:
    """FLOPs of forward and backward over one segment of `queries` tokens whose last one reads `keys` keys, each token
    before it one key less."""
    attention = arch.layers * arch.heads * arch.head_dim * queries * (2 * keys - queries)
    return float(6 * matmul_parameters(arch) * queries + 6 * attention)


def mlp_flops_share(arch: Architecture) -> float:
    """Share of a forward pass's weight multiplications that the MLPs do: what selective recomputation repeats."""
    return arch.layers * mlp_matmul_parameters(arch) / matmul_parameters(arch)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not in the table (a CPU, another GPU): then no MFU is shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
