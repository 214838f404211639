"""Parameters against transformers' models; useful work, counted by hand for one small model."""

import pytest
import torch
from transformers import Qwen3Config

from support import tiny
from vold.data.packing import pack
from vold.models.architecture import Architecture
from vold.models.flops import language_model_parameters, mlp_flops_share, peak_flops, training_flops
from vold.types import Prompt, Sample


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
    prompt, other = Prompt("shared", (1, 2), ""), Prompt("other", (3,), "")
    samples = [Sample(p, (0,) * n, 1.0, 1.0, 0.0) for p, n in ((prompt, 2), (prompt, 4), (other, 5))]
    [micro] = pack(samples, max_tokens=99).micro_batches  # segments [2 + 1], 3 that also read those 2, [1 + 4]
    attention = 2 * 6 * 8 * (3**2 + (5**2 - 2**2) + 5**2)  # per layer 2 * l^2 * d forward (causal half of 4), times 3
    assert training_flops(Architecture.from_config(config), micro.tokens) == 6 * weights * 11 + attention


def test_training_flops_of_recurrent_layers_by_hand():
    arch = Architecture.from_config(tiny.qwen3_5_text().config)  # three gated delta nets, one attention
    mlp, keys, values = 3 * 64 * 96, 2 * 16, 4 * 24
    net = (
        64 * (2 * keys + 2 * values + 2 * 4) + 4 * (2 * keys + values) + values * 64
    )  # projections, convolution, output
    attention = 64 * (2 * 4 * 32 + 2 * 2 * 32) + 4 * 32 * 64  # queries and their gates, keys, values; output
    weights = 3 * net + attention + 4 * mlp + 128 * 64
    [micro] = pack([Sample(Prompt("p", (1, 2), ""), (0,) * 5, 1.0, 1.0, 0.0)], max_tokens=99).micro_batches
    rule = 3 * 3 * 2 * 3 * 4 * 16 * 24 * 6  # nets, passes, multiply and add, products with a state of 4 heads, tokens
    assert training_flops(arch, micro.tokens) == 6 * weights * 6 + 6 * 4 * 32 * 6**2 + rule


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_those_of_transformers_language_model(family, tied):
    model = tiny.FAMILIES[family](tied=tied)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "visual" not in name)
    arch = Architecture.from_config(model.config)
    assert language_model_parameters(arch) == parameters
    assert 0 < mlp_flops_share(arch) < 1
