"""The fused policy loss in a plain transformers training step: a GRPO update without `[tokens, vocabulary]` logits.

    python examples/policy_loss_in_your_trainer.py

Needs torch, transformers and vold_kernels alone. Shapes: B sequences, L tokens, N response tokens, D hidden width.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from vold_kernels import PolicyTerms, linear_logprob, linear_policy_loss


def response_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(hidden states [N, D] that predict response tokens, those tokens [N]): instead of `model(...).logits`."""
    hidden_BLD = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    response_BL = batch["response_mask"][:, 1:].bool()  # position l predicts token l + 1
    return hidden_BLD[:, :-1][response_BL], batch["input_ids"][:, 1:][response_BL]


def grpo_loss(model: PreTrainedModel, batch: dict[str, Tensor], logp_old_N: Tensor) -> Tensor:
    """batch: input_ids, attention_mask, response_mask [B, L] and advantage [B]; logp_old: before the first update."""
    hidden_ND, target_N = response_states(model, batch)
    advantage_N = batch["advantage"].repeat_interleave(batch["response_mask"][:, 1:].sum(1))
    pg_weight_N = torch.full_like(advantage_N, 1 / len(advantage_N))  # every token counts alike; masks belong here too
    no_teacher, kl_weight_N = None, torch.zeros_like(pg_weight_N)
    terms = PolicyTerms(logp_old_N, no_teacher, advantage_N, pg_weight_N, kl_weight_N)
    out = linear_policy_loss(hidden_ND, model.lm_head.weight, target_N, terms, clip_eps_low=0.2, clip_eps_high=0.3)
    return out.loss


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mask = torch.ones(4, 24, dtype=torch.long)
    batch = {"input_ids": torch.randint(0, 1000, mask.shape), "attention_mask": mask, "response_mask": mask.clone()}
    batch["response_mask"][:, :8] = 0  # the prompts
    batch["advantage"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    with torch.no_grad():
        hidden_ND, target_N = response_states(model, batch)
        logp_old_N = linear_logprob(hidden_ND, model.lm_head.weight, target_N)
    for step in range(3):  # updates on the same rollouts
        loss = grpo_loss(model, batch, logp_old_N)
        optimizer.zero_grad()
        loss.backward()  # fills the gradients of the head and of everything below it
        optimizer.step()
        print(f"step {step + 1} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
