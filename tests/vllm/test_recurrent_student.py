"""A Qwen3.5 student, dense and a mixture, that real vLLM samples for: rollouts and scores have the trainer's log-probs,
before and after new weights arrive. In bfloat16: vLLM's CPU build runs recurrent layers in nothing else.

Two engines in bfloat16 differ by what each rounds, so the limit is the trainer's own distance from float32.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from test_sampler import make_prompts

from vold.config.schema import EngineConfig, OptimizerConfig, SamplingConfig, VllmConfig
from vold.data.packing import pack
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import id_bound, load_tokenizer
from vold.rollout import open_sampler
from vold.trainer.trainer import Trainer
from vold.types import Rollout, Sample

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
ENGINE = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.25, max_model_len=256, enforce_eager=True))
DRAWN = SamplingConfig(max_new_tokens=24, temperature=1.0)
NOISE = 0.1  # added to every trained weight between two syncs
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
EXPERTS |= {"shared_expert_intermediate_size": 96}
FACTOR = 2.0
"""vLLM's mean distance from the trainer in float32, in those of the trainer in bfloat16. Measured: up to 1.16."""
FLOOR = 0.005  # nats; of a mean, where that is smaller


def source_dir(tiny: Path, target: Path, mixture: bool) -> Path:
    """The tiny Qwen3.5 with the published width of recurrent heads, and with experts or without."""
    config = AutoConfig.from_pretrained(tiny)
    text = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    kind = Qwen3_5ForConditionalGeneration
    if mixture:
        given = config.to_dict()
        text |= {name: value for name, value in given["text_config"].items() if name not in ("model_type", *text)}
        vision = {name: value for name, value in given["vision_config"].items() if name != "model_type"}
        ids = {name: value for name, value in given.items() if name.endswith("_token_id")}
        config = Qwen3_5MoeConfig(text_config=text | EXPERTS, vision_config=vision, tie_word_embeddings=True, **ids)
        kind = Qwen3_5MoeForConditionalGeneration
    else:
        for name, value in text.items():
            setattr(config.text_config, name, value)
    shutil.copytree(tiny, target)
    torch.manual_seed(2)
    kind(config).bfloat16().save_pretrained(target)
    return target


def make_trainer(student: Path, layout, dtype: torch.dtype) -> Trainer:
    ids = id_bound(load_tokenizer(student))
    return Trainer(student, layout, OptimizerConfig(lr=1e-3), steps=1, dtype=dtype, vocab_size=ids)


def change(trainers: list[Trainer], seed: int) -> None:
    """The same noise on all trained weights of the first; the others get its weights."""
    generator = torch.Generator().manual_seed(seed)
    first, *others = [dict(trainer.chunks[0].named_parameters()) for trainer in trainers]
    with torch.no_grad():
        for name, parameter in first.items():
            if parameter.requires_grad:
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
            for other in others:
                other[name].copy_(parameter)


class Compared:
    """A sampler by vLLM, and trainers with its weights in bfloat16 and, for the same numbers, in float32."""

    def __init__(self, checkpoint: Path, layout, images: Path):
        self.trainers = [make_trainer(checkpoint, layout, dtype) for dtype in (torch.bfloat16, torch.float32)]
        self.sampler = open_sampler(ENGINE, checkpoint, dtype=torch.bfloat16, device=CPU)
        self.prompts = make_prompts(checkpoint, images, size=(192, 32))
        self.encode = load_prompt_encoder(checkpoint)

    def of_trainers(self, rollouts: list[Rollout]) -> list[torch.Tensor]:
        """Log-probs [tokens] by each trainer."""
        samples = [Sample(r.prompt, r.response_ids, 1.0, 1.0, 0.0) for r in rollouts]
        batch = pack(samples, max_tokens=1 << 20, encode=self.encode)
        found = [trainer.logprobs(batch) for trainer in self.trainers]
        return [torch.tensor([x for index in sorted(logps) for x in logps[index]]) for logps in found]

    def check(self) -> list[Rollout]:
        """Sampled and scored tokens have the trainer's log-probs but for what bfloat16 rounds."""
        rollouts = self.sampler.sample(self.prompts, DRAWN, responses=3, seed=0)
        own, exact = self.of_trainers(rollouts)
        rounded = max(float((own - exact).abs().mean()), FLOOR)
        sampled = torch.tensor([float(x) for r in rollouts for x in r.logp_rollout])
        scored = torch.tensor([x for r in rollouts for x in self.sampler.score(r.prompt, r.response_ids)])
        for name, found in (("sampled", sampled), ("scored", scored)):
            gap = (found - own).abs()
            print(
                f"{name}: {len(found)} tokens, from the trainer {gap.mean():.4f} (max {gap.max():.3f}), from float32 "
                f"{(found - exact).abs().mean():.4f}, trainer from float32 {rounded:.4f}"
            )
            assert float((found - exact).abs().mean()) < FACTOR * rounded
        return rollouts


@pytest.mark.parametrize("mixture", [True, False], ids=["mixture", "dense"])  # vLLM's first engine may have experts
def test_rollouts_have_the_trainers_logprobs_before_and_after_weights_arrive(
    mixture, tiny_qwen3_5_dir, layout, tmp_path
):
    """Text and images. Each sync is the trainer's own stream; the checkpoint is what the trainer exports."""
    source = source_dir(tiny_qwen3_5_dir, tmp_path / "source", mixture)
    trainer = make_trainer(source, layout, torch.bfloat16)
    change([trainer], seed=1)
    compared = Compared(export_checkpoint(source, tmp_path / "student", trainer.weights()), layout, tmp_path)
    before = compared.check()
    change(compared.trainers, seed=2)
    stale, _ = compared.of_trainers(before)
    old = torch.tensor([float(x) for r in before for x in r.logp_rollout])
    assert float((stale - old).abs().mean()) > 0.5, "old weights would be seen"
    compared.sampler.load_weights(compared.trainers[0].weights())
    after = compared.check()
    assert {r.version for r in after} == {1}
    seen = [[r.response_ids.tolist() for r in after[first : first + 3]] for first in (6, 9)]
    assert seen[0] != seen[1], "the images matter"
