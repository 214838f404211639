"""Useful work, counted by hand for one small model."""

import torch
from transformers import Qwen3Config

from vold.models.architecture import Architecture
from vold.trainer.flops import peak_flops, training_flops


def test_training_flops_by_hand():
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    per_layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k, v, o, and the gated MLP
    weights = 2 * per_layer + 100 * 8
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
    attention = 2 * 6 * 8 * (3**2 + 5**2)  # per layer 2 * l^2 * d forward (causal half of 4), three times with backward
    assert training_flops(Architecture.from_config(config), lengths) == 6 * weights * 8 + attention


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu")) is None
