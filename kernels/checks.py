"""Errors a caller can make, found from shapes and dtypes alone: nothing here reads a tensor's values (no host sync)."""

import torch
from torch import Tensor

from .records import PolicyTerms

SUPPORTED = (torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden_ND: Tensor, weight_UD: Tensor, target_N: Tensor, *, temperature: float) -> None:
    if hidden_ND.ndim != 2 or weight_UD.ndim != 2 or hidden_ND.shape[1] != weight_UD.shape[1] or not len(weight_UD):
        raise ValueError(
            f"hidden is {tuple(hidden_ND.shape)} and weight {tuple(weight_UD.shape)}; they must be [N, D] and [V, D] "
            "with V > 0: flatten batch and sequence, and pass the weight as nn.Linear stores it"
        )
    if target_N.shape != hidden_ND.shape[:1] or target_N.dtype.is_floating_point or target_N.dtype == torch.bool:
        raise ValueError(f"target is {target_N.dtype} {tuple(target_N.shape)}; it must be integer [{len(hidden_ND)}]")
    if hidden_ND.dtype != weight_UD.dtype or hidden_ND.dtype not in SUPPORTED:
        raise ValueError(
            f"hidden is {hidden_ND.dtype} and weight {weight_UD.dtype}; both must be the same one of bfloat16, float32 "
            "or float64 (float16 cannot hold per-token gradients): cast one of them"
        )
    if not hidden_ND.device == weight_UD.device == target_N.device:
        raise ValueError(
            f"hidden, weight and target are on {hidden_ND.device}, {weight_UD.device} and {target_N.device}; "
            "move them to one device"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")


def check_vocab_size(weight_UD: Tensor, vocab_size: int | None, *, sharded: bool) -> None:
    if vocab_size is None:
        return
    if vocab_size < 1 or (not sharded and vocab_size > len(weight_UD)):
        raise ValueError(f"vocab_size is {vocab_size}; the weight has {len(weight_UD)} rows, so pass 1 to that many")


def check_policy(terms: PolicyTerms, tokens: int, *, eps_low: float, eps_high: float) -> None:
    for name, value in vars(terms).items():
        if value is not None and value.shape != (tokens,):
            raise ValueError(
                f"terms.{name} is {tuple(value.shape)}; hidden has {tokens} rows, so it must be [{tokens}]"
            )
    if not 0 <= eps_low <= 1 or not eps_high >= 0:
        raise ValueError(
            f"eps_low is {eps_low} and eps_high {eps_high}; the clip range [1 − eps_low, 1 + eps_high] must hold 1 "
            "and nothing negative"
        )
