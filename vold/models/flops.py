"""Parameters and matrix-multiply work of a language model, by its architecture alone, and the peak rate of a GPU.

All functions that name an architecture count the undivided text model: no vision tower, no parallel division.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vold.models.architecture import Architecture
from vold.models.joined import weight_rows
from vold.types import PackedTokens

# dense bf16 matrix-multiply peak, FLOP/s, by a part of the device's name
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


# Parameters ----------------------------------------------------------------------------------------------------------


def mixer_matrices(arch: Architecture, layer: int) -> dict[str, int]:
    """Weights of what reads across tokens in a layer (from 0), by their short names in it: attention's projections, or
    a gated delta net's and its convolution."""
    names = [f"self_attn.{x}_proj" for x in "qkv"]
    if arch.is_delta_net(layer):
        names = [f"linear_attn.in_proj_{x}" for x in "qkvzba"]
    weights = {name: arch.hidden * weight_rows(f"{name}.weight", arch) for name in names}
    if not arch.is_delta_net(layer):
        return weights | {"self_attn.o_proj": arch.hidden * arch.heads * arch.head_dim}
    net = arch.delta_net
    convolution = {name: weight_rows(f"{name}.weight", arch) for name in (f"linear_attn.conv1d_{x}" for x in "qkv")}
    weights |= {name: net.window * channels for name, channels in convolution.items()}
    return weights | {"linear_attn.out_proj": arch.hidden * net.value_heads * net.value_width}


def mlp_matmul_parameters(arch: Architecture) -> int:
    """Weights of one layer's gate, up and down projections; of a mixture those that a token meets, and the router."""
    mixture = arch.mixture
    if mixture is None:
        return 3 * arch.hidden * arch.ffn
    shared = 3 * mixture.shared + bool(mixture.shared)  # and its gate
    return arch.hidden * (3 * arch.ffn * mixture.per_token + mixture.experts + shared)


def expert_parameters(arch: Architecture) -> int:
    """Weights of one layer's experts; 0 without a mixture."""
    return 3 * arch.hidden * arch.ffn * arch.mixture.experts if arch.mixture else 0


def idle_parameters(arch: Architecture) -> int:
    """Weights of one layer's experts that a token does not go to."""
    mixture = arch.mixture
    return 3 * arch.hidden * arch.ffn * (mixture.experts - mixture.per_token) if mixture else 0


def layer_matmul_parameters(arch: Architecture, layer: int) -> int:
    """Weights that one layer, from 0, multiplies every token with."""
    return sum(mixer_matrices(arch, layer).values()) + mlp_matmul_parameters(arch)


def matmul_parameters(arch: Architecture) -> int:
    """Weights that the model multiplies every token with: all layers and the head (the embedding only looks up)."""
    return sum(layer_matmul_parameters(arch, layer) for layer in range(arch.layers)) + arch.vocab * arch.hidden


def layer_parameters(arch: Architecture, layer: int) -> int:
    """All parameters of one layer: projections, their biases, and norms."""
    biases = arch.qkv_bias * (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    norms = 2 * arch.hidden + arch.qk_norm * 2 * arch.head_dim
    if arch.is_delta_net(layer):
        biases, norms = 2 * arch.delta_net.value_heads, 2 * arch.hidden + arch.delta_net.value_width
    return layer_matmul_parameters(arch, layer) + idle_parameters(arch) + biases + norms


def language_model_parameters(arch: Architecture) -> int:
    """All parameters of the language model; a tied head counts once."""
    vocabulary = (1 if arch.tied else 2) * arch.vocab * arch.hidden
    return sum(layer_parameters(arch, layer) for layer in range(arch.layers)) + arch.hidden + vocabulary


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
    if arch.mixture is None:
        mlp = {f"mlp.{name}_proj": arch.hidden * arch.ffn for name in ("gate", "up", "down")}
    else:  # a parameter has all experts, so one stands for them
        one = arch.hidden * arch.mixture.per_token * arch.ffn
        mlp = {f"mlp.experts.0.{name}_proj": one for name in ("gate", "up", "down")}
        mlp |= {"mlp.gate": arch.hidden * arch.mixture.experts}
        shared = arch.hidden * arch.mixture.shared
        mlp |= {f"mlp.shared_expert.{name}_proj": shared for name in ("gate", "up", "down")} if shared else {}
        mlp |= {"mlp.shared_expert_gate": arch.hidden} if shared else {}
    others = [f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    others += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    others += [f"linear_attn.{name}" for name in ("A_log", "dt_bias", "norm.weight")] if arch.delta_net else []
    head = "embed_tokens.weight" if arch.tied else "lm_head.weight"
    weights, lowest = arch.vocab * arch.hidden * is_trained(head), arch.layers
    for layer in reversed(range(arch.layers)):
        sizes = mixer_matrices(arch, layer) | mlp
        trained = [name for name in sizes if is_trained(f"layers.{layer}.{name}.weight")]
        weights += sum(sizes[name] for name in trained)
        if trained or any(is_trained(f"layers.{layer}.{name}") for name in others):
            lowest = layer
    through_embedding = through_embedding or is_trained("embed_tokens.weight")
    return Backward(weights, 0 if through_embedding else lowest, is_trained(head))


# Work ----------------------------------------------------------------------------------------------------------------


def training_flops(arch: Architecture, tokens: PackedTokens, backward: Backward | None = None) -> float:
    """FLOPs of forward and backward over packed tokens: 6 per weight and token (4 for frozen ones, whose gradient is
    not computed, 2 below the lowest trained one; adapters are left out), plus causal attention and the delta rule.
    Recomputation and padding do not count, and a prompt that responses share counts once. backward: None: everything is
    trained."""
    total = sum(segment_flops(arch, queries, keys) for queries, keys in tokens.segments)
    if backward is None:
        return total
    below = range(backward.untouched)
    mixing = sum(mixing_flops(arch, queries, keys, below) for queries, keys in tokens.segments)
    weights = matmul_parameters(arch) - backward.weights + sum(layer_matmul_parameters(arch, n) for n in below)
    return total - 2 * weights * sum(queries for queries, _ in tokens.segments) - mixing * 2 / 3


def idle_head_flops(arch: Architecture, tokens: int, backward: Backward | None = None) -> float:
    """What `training_flops` counts for the head on `tokens` tokens without a target, on which it does not run."""
    products = 3 if backward is None or backward.head else 2
    return 2.0 * products * arch.vocab * arch.hidden * tokens


def mixing_flops(arch: Architecture, queries: int, keys: int, layers: range) -> float:
    """Those of `segment_flops` in these layers that multiply no weight, a third of them forward: causal attention, or
    the delta rule, of which each token reads, changes and reads again a state for each value head."""
    nets = sum(arch.is_delta_net(layer) for layer in layers)
    flops = 6.0 * (len(layers) - nets) * arch.heads * arch.head_dim * queries * (2 * keys - queries)
    if nets:
        net = arch.delta_net
        flops += 18.0 * nets * net.value_heads * net.key_width * net.value_width * queries
    return flops


def segment_flops(arch: Architecture, queries: int, keys: int) -> float:
    """FLOPs of forward and backward over one segment of `queries` tokens whose last one reads `keys` keys, each token
    before it one key less."""
    return float(6 * matmul_parameters(arch) * queries) + mixing_flops(arch, queries, keys, range(arch.layers))


def mlp_flops_share(arch: Architecture) -> float:
    """Share of a forward pass's weight multiplications that the MLPs do: what selective recomputation repeats."""
    return arch.layers * mlp_matmul_parameters(arch) / matmul_parameters(arch)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not in the table (a CPU, another GPU): then no MFU is shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
