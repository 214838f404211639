"""vLLM loads what `vold` exports, at once, and agrees with transformers: greedy ids exactly, log-probs within 1e-4.

Run by tests/vllm/run.sh in .venv-vllm, where vold is not installed; expectations.py has written the other side.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

# Not `vllm` itself: this folder's name would pass for it where vLLM is absent.
pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")
if "VOLD_VLLM_EXPECTATIONS" not in os.environ:
    pytest.skip("needs the exported checkpoints: make test-vllm", allow_module_level=True)

from PIL import Image
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.vllm

EXPECTED = json.loads(Path(os.environ["VOLD_VLLM_EXPECTATIONS"]).read_text())
CASES = {case["id"]: case for case in EXPECTED["cases"]}
SCORED = [name for name, case in CASES.items() if case["logp_teacher"]]
SEEN = [name for name, case in CASES.items() if case["images"]]
REAL_IDS = range(EXPECTED["real_ids"])
ATOL = 1e-4


def engine(directory: str, **options) -> LLM:
    """max_logprobs -1: a request may ask for the whole vocabulary."""
    settings = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 256, "max_logprobs": -1}
    return LLM(directory, **settings, **options)


def vllm_prompt(case: dict, response_ids: Sequence[int] = ()) -> TokensPrompt:
    """One image-pad id per image, as in vold's own prompts; vLLM expands it."""
    prompt = TokensPrompt(prompt_token_ids=[*case["prompt_ids"], *response_ids])
    if case["images"]:
        prompt["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in case["images"]]}
    return prompt


def renormalised(logprobs: dict, token_id: int) -> float:
    """vLLM's log-probs are raw: head rows without a token take a share, which vold's samplers never give them."""
    return logprobs[token_id].logprob - math.log(sum(math.exp(logprobs[i].logprob) for i in REAL_IDS))


@pytest.fixture(scope="module")
def responses():
    """The student's, to all prompts in one call: texts of different lengths and images side by side."""
    llm = engine(EXPECTED["student"], limit_mm_per_prompt={"image": 1, "video": 0})
    drawable = [i for i in REAL_IDS if i != EXPECTED["image_id"]]
    greedy = SamplingParams(
        temperature=0.0, max_tokens=EXPECTED["max_new_tokens"], logprobs=-1, allowed_token_ids=drawable
    )
    requests = llm.generate([vllm_prompt(case) for case in CASES.values()], greedy, use_tqdm=False)
    return {name: request.outputs[0] for name, request in zip(CASES, requests, strict=True)}


@pytest.fixture(scope="module")
def scored():
    """Log-probs of prompts and the student's responses to them under the teacher, and under the teacher with its
    adapter, by one engine. A slot for an adapter stays free: with all occupied vLLM 0.32 scores the base wrongly."""
    modules = json.loads((Path(EXPECTED["adapter"]) / "adapter_config.json").read_text())["target_modules"]
    # Unless the targets are named vLLM wraps the head too, which then has no prompt log-probs.
    llm = engine(EXPECTED["teacher"], enable_lora=True, max_loras=2, max_lora_rank=8, lora_target_modules=modules)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=-1)
    prompts = [vllm_prompt(CASES[name], CASES[name]["response_ids"]) for name in SCORED]
    found = {}
    for key, adapter in (("logp_adapted", LoRARequest("adapter", 1, EXPECTED["adapter"])), ("logp_teacher", None)):
        requests = llm.generate(prompts, scoring, use_tqdm=False, lora_request=adapter)
        found[key] = {name: request.prompt_logprobs for name, request in zip(SCORED, requests, strict=True)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_and_logprobs_are_those_of_transformers(responses, name):
    case, found = CASES[name], responses[name]
    assert list(found.token_ids) == case["response_ids"]
    assert found.finish_reason == case["finish_reason"]
    logp = [renormalised(*step) for step in zip(found.logprobs, found.token_ids, strict=True)]
    assert logp == pytest.approx(case["logp_student"], rel=0, abs=ATOL)


def test_an_image_is_seen():
    """One question about two images: the test above would be empty if neither engine looked."""
    first, second = (CASES[name] for name in SEEN)
    assert first["prompt_ids"] == second["prompt_ids"]
    assert first["response_ids"] != second["response_ids"]


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("key", ["logp_teacher", "logp_adapted"])
def test_a_response_is_scored_as_transformers_does(scored, key, name):
    """With the adapter: as transformers scores the model that vold has merged it into."""
    case = CASES[name]
    response = scored[key][name][len(case["prompt_ids"]) :]
    logp = [renormalised(*step) for step in zip(response, case["response_ids"], strict=True)]
    assert logp == pytest.approx(case[key], rel=0, abs=ATOL)
    assert max(abs(a - b) for a, b in zip(case["logp_teacher"], case["logp_adapted"], strict=True)) > 0.1
