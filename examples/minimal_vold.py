"""VOLD's second stage on one page: transformers, vold_kernels, an Objective and a Grader. No Megatron, one process.

    python examples/minimal_vold.py                      # an untrained tiny world, to see the parts move
    python examples/minimal_vold.py --student runs/demo/sft/model --teacher runs/miniature/seed0/teacher \
        --data runs/miniature/seed0/data/train.json      # the world that `make demo` leaves: the reward rises

Each response is sampled once and used twice: for a policy gradient on a verifiable reward, and, where it failed, for
distillation towards the teacher. A record at each stage (vold/types.py):

    Prompt -> generate -> Rollout -> grade -> Group -> assign_token_weights -> Sample -> train_step -> new weights

The trainer does the same with packed tokens, parallel layouts, images, engines and checkpoints (vold/train/rl.py);
tests/examples/test_minimal_vold.py holds three steps of the two to each other.

Shapes: B sequences, L tokens of prompt and response, N response tokens of a step, n of them that the teacher scores,
D hidden width of the student, E of the teacher, V rows of a head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from vold import Grader, Objective, build_objective
from vold.config.schema import DataConfig, ObjectiveConfig, PromptConfig
from vold.data.order import rows_of_step
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.types import Group, Prompt, Rollout, Sample
from vold_kernels import PolicyTerms, linear_logprob, linear_policy_loss

PROMPTS_PER_STEP, RESPONSES, MAX_NEW_TOKENS = 32, 5, 40


@dataclass(frozen=True)
class Models:
    """Student and frozen teacher. vocab_size: ids that both tokenizers have; head rows beyond them are padding."""

    policy: PreTrainedModel
    teacher: PreTrainedModel
    vocab_size: int


def sample_rollouts(policy: PreTrainedModel, tokenizer, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
    """RESPONSES rollouts of each prompt, at temperature 1, so that log-probs of sampler and loss are the same thing."""
    prompt_ids = [list(map(int, prompt.token_ids)) for prompt in prompts]
    inputs = tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt")
    # A head has more rows than there are tokens, and an image pad is no text: neither may be drawn.
    unreal = [*range(len(tokenizer), policy.lm_head.weight.shape[0]), policy.config.image_token_id]
    sequences_BL = policy.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=RESPONSES,
        max_new_tokens=MAX_NEW_TOKENS,
        suppress_tokens=unreal,
    )
    responses_BL = sequences_BL[:, inputs["input_ids"].shape[1] :].tolist()
    rows = [responses_BL[i : i + RESPONSES] for i in range(0, len(responses_BL), RESPONSES)]
    return [[rollout(p, ids, tokenizer) for ids in row] for p, row in zip(prompts, rows, strict=True)]


def rollout(prompt: Prompt, ids: list[int], tokenizer) -> Rollout:
    """Ids as sampled, up to and including the first end token: they are never decoded and encoded again."""
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if stopped else ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(prompt, tuple(ids), logp_rollout=(), finish_reason="stop" if stopped else "length", text=text)


def grade(rollouts: Sequence[Rollout], grader: Grader) -> Group:
    """Siblings with their rewards: 1 for a right boxed answer, 0 for any other, None where grading itself broke."""
    verdicts = grader.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    rewards = [None if v.outcome == "broken" else float(v.outcome == "correct") for v in verdicts]
    return Group(rollouts[0].prompt, tuple(rollouts), tuple(verdicts), tuple(rewards))


def response_states(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(hidden states [N, D] that predict each response token, the tokens [N]). Logits [N, V] are never made."""
    rows = [torch.tensor([*s.prompt.token_ids, *s.response_ids], dtype=torch.long) for s in samples]
    mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids_BL = pad_sequence(rows, batch_first=True)
    hidden_BLD = model.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    of_response_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    for row, sample in zip(of_response_BL, samples, strict=True):
        row[len(sample.prompt.token_ids) : len(sample.prompt.token_ids) + len(sample.response_ids)] = True
    # The state one position earlier predicts a token: the prompt's last one predicts the first of the response.
    return hidden_BLD[:, :-1][of_response_BL[:, 1:]], ids_BL[of_response_BL]


def train_step(
    models: Models, samples: Sequence[Sample], objective: Objective, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One update. Each token's two weights, in `samples`, contain beta, masks and the normaliser."""
    samples = [sample for sample in samples if sample.pg_weight or sample.kl_weight]  # all others have no gradient
    if not samples:
        return {}
    policy, teacher, vocab_size = models.policy, models.teacher, models.vocab_size
    hidden_ND, target_N = response_states(policy, samples)
    lengths_B = torch.tensor([len(sample.response_ids) for sample in samples])

    def per_token(field: str) -> Tensor:
        return torch.tensor([getattr(sample, field) for sample in samples]).repeat_interleave(lengths_B)

    kl_weight_N = per_token("kl_weight")
    logp_teacher_N = torch.zeros_like(kl_weight_N)
    failed = [sample for sample in samples if sample.kl_weight]  # the teacher reads nothing else
    if failed:
        with torch.no_grad():
            hidden_nE, target_n = response_states(teacher, failed)
            logp_n = linear_logprob(hidden_nE, teacher.lm_head.weight, target_n, vocab_size=vocab_size)
        logp_teacher_N[kl_weight_N != 0] = logp_n

    # logp_old None: these weights sampled the responses, so the importance ratio is 1 and nothing is clipped yet.
    terms = PolicyTerms(None, logp_teacher_N, per_token("advantage"), per_token("pg_weight"), kl_weight_N)
    bounds = {"clip_eps_low": objective.clip_eps_low, "clip_eps_high": objective.clip_eps_high}
    out = linear_policy_loss(hidden_ND, policy.lm_head.weight, target_N, terms, vocab_size=vocab_size, **bounds)
    optimizer.zero_grad()
    out.loss.backward()
    clip_grad_norm_((p for p in policy.parameters() if p.requires_grad), 1.0)
    optimizer.step()
    k2_N = 0.5 * (out.logp_N - logp_teacher_N).square()[kl_weight_N != 0]  # estimates KL(student || teacher), nats
    return {"loss": out.loss.item()} | ({"kl_teacher": k2_N.mean().item()} if failed else {})


def build_optimizer(policy: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed, and the vision tower stays as it is: training data is text alone."""
    if hasattr(policy.model, "visual"):
        policy.model.visual.requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01}
    return torch.optim.AdamW([decayed, {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}], lr=lr)


def tiny_world(root: Path) -> tuple[Path, Path, Path]:
    """(student, teacher, problems) of the miniature, untrained: rewards stay 0, distillation has something to do."""
    from vold.miniature import data, models

    if not root.exists():
        models.save_checkpoint(models.new_model(models.base_config(), seed=0), root / "student")
        models.save_checkpoint(models.new_model(models.teacher_config(), seed=1), root / "teacher")
        data.write_data(root / "data", seed=0, sizes=data.DataSizes(train=512, val=1, test=1))
    return root / "student", root / "teacher", root / "data" / "train.json"


def train(student: Path, teacher: Path, data: Path, *, steps: int, lr: float) -> list[dict[str, float]]:
    """The loop. Prints and returns a row of metrics for each step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    policy = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).requires_grad_(False)
    models = Models(policy, frozen, vocab_size=len(tokenizer))
    problems = load_problems(DataConfig(path=data, layout="orz"))
    prompts = build_prompts(problems, tokenizer, PromptConfig(suffix=""))
    objective = build_objective(ObjectiveConfig(preset="vold", beta=0.3), MAX_NEW_TOKENS)
    optimizer, history = build_optimizer(policy, lr), []
    with Grader() as grader:
        for step in range(steps):
            rows = rows_of_step(step, rows=len(prompts), per_step=PROMPTS_PER_STEP, seed=0)
            rollouts = sample_rollouts(policy, tokenizer, [prompts[row] for row in rows])
            groups = [grade(siblings, grader) for siblings in rollouts]
            samples = objective.assign_token_weights(groups)
            metrics = train_step(models, samples, objective, optimizer)
            rewards = [reward for group in groups for reward in group.rewards if reward is not None]
            history.append({"reward": sum(rewards) / max(len(rewards), 1)} | metrics)
            print(f"step {step + 1}", *(f"{name} {value:.4f}" for name, value in history[-1].items()), flush=True)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, help="all three, or none: then an untrained tiny world is made")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    paths = (options.student, options.teacher, options.data)
    train(*(paths if all(paths) else tiny_world(Path("runs/tiny-world"))), steps=options.steps, lr=options.lr)


if __name__ == "__main__":
    main()
