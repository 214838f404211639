"""Parameters and matrix-multiply work of a language model, by its architecture alone, and the peak rate of a GPU.

All functions that name an architecture count the undivided text model: no vision tower, no parallel division.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Weights of one layer's gate, up and down projections; of a mixture those that a token meets, and the router."""
    if arch.mixture is None:
        return 3 * arch.hidden * arch.ffn
    return arch.hidden * (3 * arch.ffn * arch.mixture.per_token + arch.mixture.experts)


def expert_parameters(arch: Architecture) -> int:
    """Weights of one layer's experts; 0 without a mixture."""
    return 3 * arch.hidden * arch.ffn * arch.mixture.experts if arch.mixture else 0


def idle_parameters(arch: Architecture) -> int:
    """Weights of one layer's experts that a token does not go to."""
    mixture = arch.mixture
    return 3 * arch.hidden * arch.ffn * (mixture.experts - mixture.per_token) if mixture else 0


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
    return layer_matmul_parameters(arch) + idle_parameters(arch) + biases + norms


def language_model_parameters(arch: Architecture) -> int:
    """All parameters of the language model; a tied head counts once."""
    vocabulary = (1 if arch.tied else 2) * arch.vocab * arch.hidden
    return arch.layers * layer_parameters(arch) + arch.hidden + vocabulary


def active_parameters(arch: Architecture) -> int:
    """Of these the ones that a token meets: without the other experts of a mixture."""
    return language_model_parameters(arch) - arch.layers * idle_parameters(arch)


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


@dataclass(frozen=True)
class Backward:
    """What a backward pass computes: gradients of `weights` (elements that multiply tokens; the head's among them where
    `head`), and gradients through all layers but the lowest `untouched`."""

    weights: int
    untouched: int = 0
    head: bool = True


def backward_of(arch: Architecture, is_trained: Callable[[str], bool], through_embedding: bool) -> Backward:
    """is_trained: by short names. through_embedding: a weight before the layers is trained, or an adapter."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    sizes |= {"self_attn.o_proj": queries}
    if arch.mixture is None:
        sizes |= {f"mlp.{name}_proj": arch.ffn for name in ("gate", "up", "down")}
    else:  # a parameter has all experts, so one stands for them
        per_token = arch.mixture.per_token
        sizes |= {f"mlp.experts.0.{name}_proj": per_token * arch.ffn for name in ("gate", "up", "down")}
        sizes |= {"mlp.gate": arch.mixture.experts}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    head = "embed_tokens.weight" if arch.tied else "lm_head.weight"
    weights, lowest = arch.vocab * arch.hidden * is_trained(head), arch.layers
    for layer in reversed(range(arch.layers)):
        trained = [name for name in sizes if is_trained(f"layers.{layer}.{name}.weight")]
        weights += arch.hidden * sum(sizes[name] for name in trained)
        if trained or any(is_trained(f"layers.{layer}.{name}.weight") for name in norms):
            lowest = layer
    through_embedding = through_embedding or is_trained("embed_tokens.weight")
    return Backward(weights, 0 if through_embedding else lowest, is_trained(head))


# Work ----------------------------------------------------------------------------------------------------------------


def training_flops(arch: Architecture, tokens: PackedTokens, backward: Backward | None = None) -> float:
    """FLOPs of forward and backward over packed tokens: 6 per weight and token (4 for frozen ones, whose gradient is
    not computed, 2 below the lowest trained one; adapters are left out), plus causal attention. Recomputation and
    padding do not count, and a prompt that responses share counts once. backward: None: everything is trained."""
    total = sum(segment_flops(arch, queries, keys) for queries, keys in tokens.segments)
    if backward is None:
        return total
    below = backward.untouched / arch.layers
    attention = sum(attention_flops(arch, queries, keys) for queries, keys in tokens.segments)
    weights = matmul_parameters(arch) - backward.weights + backward.untouched * layer_matmul_parameters(arch)
    return total - 2 * weights * sum(queries for queries, _ in tokens.segments) - below * attention * 2 / 3


def idle_head_flops(arch: Architecture, tokens: int, backward: Backward | None = None) -> float:
    """What `training_flops` counts for the head on `tokens` tokens without a target, on which it does not run."""
    products = 3 if backward is None or backward.head else 2
    return 2.0 * products * arch.vocab * arch.hidden * tokens


def attention_flops(arch: Architecture, queries: int, keys: int) -> float:
    """Those of `segment_flops` that are attention's, a third of them forward."""
    return 6.0 * arch.layers * arch.heads * arch.head_dim * queries * (2 * keys - queries)


def segment_flops(arch: Architecture, queries: int, keys: int) -> float:
    """FLOPs of forward and backward over one segment of `queries` tokens whose last one reads `keys` keys, each token
    before it one key less."""
    return float(6 * matmul_parameters(arch) * queries) + attention_flops(arch, queries, keys)


def mlp_flops_share(arch: Architecture) -> float:
    """Share of a forward pass's weight multiplications that the MLPs do: what selective recomputation repeats."""
    return arch.layers * mlp_matmul_parameters(arch) / matmul_parameters(arch)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not in the table (a CPU, another GPU): then no MFU is shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
