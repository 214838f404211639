"""Teachers of architectures that the trainer does not have, in real vLLM: transformers' log-probs, also after new
weights arrived, and hidden states that fit their head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from vold.config.schema import VllmConfig
from vold.data.packing import pack
from vold.miniature import models
from vold.models.architecture import Architecture
from vold.models.tokenizer import check_pair
from vold.rollout.vllm.engines import Request
from vold.teacher import VllmDistributions
from vold.types import Prompt, Sample
from vold_kernels import linear_logprob

pytestmark = pytest.mark.vllm

SETTINGS = VllmConfig(kv_cache_gib=0.25, max_model_len=64, enforce_eager=True)
SAMPLES = [
    Sample(Prompt(f"p{first}", (first, 9, 10), ""), response, 0.0, 0.0, 1.0)
    for first, response in [(11, (21, 22, 5)), (12, (23,)), (13, tuple(range(8, 30)))]
]


def qwen3_moe():
    text = models._text_settings() | {"tie_word_embeddings": False, "head_dim": 32, "moe_intermediate_size": 64}
    return transformers.Qwen3MoeConfig(**text, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)


def llama():
    return transformers.LlamaConfig(**models._text_settings() | {"head_dim": 32})


def gemma():
    text = models._text_settings() | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
    return transformers.Gemma3TextConfig(
        **text, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    )


def saved(config, directory: Path, seed: int):
    """A model with norms that are not trivial, in fp32, and its checkpoint with the miniature's tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.generation_config = transformers.GenerationConfig(do_sample=False, **models.ENDINGS)
    models.save_checkpoint(model, directory)
    return model


def logps(model, sample: Sample, vocab: int) -> list[float]:
    prompt, response = sample.prompt.token_ids.tolist(), sample.response_ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :vocab]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("family", [qwen3_moe, llama, gemma])
def test_scores_and_distributions(family, tiny_student_dir, tmp_path, layout):
    config = family()
    model = saved(config, tmp_path / "teacher", seed=0)
    vocab = check_pair(tiny_student_dir, tmp_path / "teacher", served=True).shared_vocab_size
    rows = Architecture.from_pretrained(tiny_student_dir).vocab
    numbers = {"dtype": torch.float32, "vocab_size": vocab, "student_rows": rows}
    teacher = VllmDistributions(tmp_path / "teacher", SETTINGS, layout, **numbers)
    (micro,) = teacher.score(pack(SAMPLES, max_tokens=1 << 20)).micro_batches
    found = linear_logprob(micro.hidden_teacher_nE, micro.head_teacher_UE, micro.target_N, vocab_size=vocab)
    expected = [x for index in micro.sample_B for x in logps(model, SAMPLES[index], vocab)]
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-5)

    requests = [Request.scoring(sample.prompt, sample.response_ids, None) for sample in SAMPLES]
    for seed in (1, 2):
        model = saved(config, tmp_path / str(seed), seed)
        weights = dict(model.named_parameters())
        if config.tie_word_embeddings:  # as vold streams it
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        teacher._engines.load_weights(list(weights.items()), seed)
        scored = dict(teacher._engines.stream(requests))
        for index, sample in enumerate(SAMPLES):
            assert scored[index].scored == pytest.approx(logps(model, sample, vocab), rel=0, abs=1e-4)
