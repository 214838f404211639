"""SmolLM2-135M-Instruct, as test_smollm2.py has converted it, in real vLLM: the ids and log-probs of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from vold.config.schema import EngineConfig, PromptConfig, SamplingConfig, VllmConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.tokenizer import load_tokenizer
from vold.rollout import TransformersSampler, open_sampler

pytestmark = pytest.mark.real
MODEL = Path(os.environ.get("VOLD_REAL", ".real")) / "SmolLM2-135M-Instruct"
ENGINE = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.25, max_model_len=256, enforce_eager=True))
GREEDY = SamplingConfig(max_new_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def samplers(layout):
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL} is not there: tests/real/test_smollm2.py converts it")
    cpu = torch.device("cpu")
    engine = open_sampler(ENGINE, MODEL, dtype=torch.float32, device=cpu)
    return engine, TransformersSampler(MODEL, dtype=torch.float32, device=cpu)


def prompts():
    tokenizer = load_tokenizer(MODEL)
    questions = ("What is 12 + 30?", "Name the capital of France.", "Write a haiku.")
    return [build_prompt(Problem(q, q), tokenizer, PromptConfig(suffix="")) for q in questions]


def test_greedy_answers_are_transformers(samplers):
    ours, theirs = (sampler.sample(prompts(), GREEDY, responses=1, seed=0) for sampler in samplers)
    assert [list(rollout.response_ids) for rollout in ours] == [list(rollout.response_ids) for rollout in theirs]
    assert [rollout.finish_reason for rollout in ours] == [rollout.finish_reason for rollout in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert max(abs(a - b) for a, b in zip(one.logp_rollout, other.logp_rollout, strict=True)) < 1e-4


def test_answers_end_with_the_chats_end_token(samplers):
    [rollout] = samplers[0].sample(
        prompts()[1:2], SamplingConfig(max_new_tokens=64, temperature=0.0), responses=1, seed=0
    )
    assert rollout.finish_reason == "stop" and list(rollout.response_ids)[-1] == 2
