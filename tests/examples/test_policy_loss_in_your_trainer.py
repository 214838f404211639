"""examples/policy_loss_in_your_trainer.py runs, and its loss and gradients are those of materialised logits."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "policy_loss_in_your_trainer.py"


def test_it_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (-?[\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("on_policy", [True, False])
def test_loss_and_gradients_equal_materialised_logits(on_policy):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 101}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    ids_BL, advantage_B = torch.randint(0, 101, (3, 12)), torch.tensor([1.0, -1.5, 0.5])
    attention_BL, response_BL = torch.ones_like(ids_BL), torch.zeros_like(ids_BL)
    attention_BL[1, 10:] = 0
    response_BL[0, 4:], response_BL[1, 5:10], response_BL[2, 2:7] = 1, 1, 1
    logits_BLV = model(ids_BL, attention_mask=attention_BL).logits[:, :-1]
    logp_BL = logits_BLV.log_softmax(-1).gather(2, ids_BL[:, 1:, None])[..., 0]
    old_BL = logp_BL.detach() + (0.0 if on_policy else 0.4) * torch.randn_like(logp_BL)
    ratio_BL, advantage_B1 = (logp_BL - old_BL).exp(), advantage_B[:, None]
    surrogate_BL = torch.minimum(ratio_BL * advantage_B1, ratio_BL.clamp(0.8, 1.3) * advantage_B1)
    expected = -surrogate_BL[response_BL[:, 1:].bool()].mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    batch = {
        "input_ids": ids_BL,
        "attention_mask": attention_BL,
        "response_mask": response_BL,
        "advantage": advantage_B,
    }
    loss = runpy.run_path(str(EXAMPLE))["grpo_loss"](model, batch, old_BL[response_BL[:, 1:].bool()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, expected_gradient in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        limit = 1e-5 * float(expected_gradient.abs().max())
        assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=limit)
