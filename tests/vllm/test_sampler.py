"""VllmSampler beside TransformersSampler: the same greedy ids and log-probs, with the same weights, before and after
they are synced. Real vLLM, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from support.steps import ids_of
from vold.config.schema import EngineConfig, PromptConfig, SamplingConfig, VllmConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.miniature import world
from vold.models.tokenizer import load_tokenizer
from vold.rollout import TransformersSampler, open_sampler
from vold.types import Prompt

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
ENGINE = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.25, max_model_len=256, enforce_eager=True))
GREEDY = SamplingConfig(max_new_tokens=16, temperature=0.0)
ATOL = 1e-4


def make_prompts(student_dir: Path, images: Path, size: tuple[int, int] | None = None) -> list[Prompt]:
    """Two texts of different lengths, then one question about each of two images (of this width and height)."""
    rng = np.random.default_rng(0)
    problems = [Problem(f"text{i}", world.text_question(world.sample_problem(rng, "test"), rng)) for i in range(2)]
    question = world.image_question(rng)
    for i, grey in enumerate(world.render([world.sample_problem(rng, "test").expression for _ in range(2)], rng)):
        path = images / f"image{i}.png"
        image = Image.fromarray(grey)
        (image if size is None else image.resize(size)).save(path)
        problems.append(Problem(f"image{i}", question, images=(path,)))
    tokenizer = load_tokenizer(student_dir)
    return [build_prompt(problem, tokenizer, PromptConfig(suffix="")) for problem in problems]


@pytest.fixture(scope="module")
def prompts(tiny_student_dir, tmp_path_factory) -> list[Prompt]:
    return make_prompts(tiny_student_dir, tmp_path_factory.mktemp("images"))


def open_pair(student_dir: Path) -> tuple:
    return (
        open_sampler(ENGINE, student_dir, dtype=torch.float32, device=CPU),
        TransformersSampler(student_dir, dtype=torch.float32, device=CPU),
    )


@pytest.fixture(scope="module")
def pair(tiny_student_dir, layout):
    """Both engines with one checkpoint, from here on given the same weights; in a process that trains, too."""
    return open_pair(tiny_student_dir)


def other_weights(checkpoint: Path, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Every weight but the vision tower's, changed: as `Trainer.weights` streams them, a tied head by its own name."""
    model = TransformersSampler(checkpoint, dtype=torch.float32, device=CPU)._model
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: weight.detach() + 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in model.named_parameters()
        if "visual" not in name
    }
    embedding = next(weight for name, weight in changed.items() if name.endswith("embed_tokens.weight"))
    return list(({"lm_head.weight": embedding} | changed).items())


def agree(pair, prompts) -> list[tuple[int, ...]]:
    """Greedy ids are equal, log-probs too; returns the ids."""
    ours, theirs = (sampler.sample(prompts, GREEDY, responses=1, seed=0) for sampler in pair)
    for mine, yours in zip(ours, theirs, strict=True):
        # vLLM names no experts of a mixture
        assert replace(mine, logp_rollout=(), experts=None) == replace(yours, logp_rollout=(), experts=None)
        assert mine.logp_rollout == pytest.approx(yours.logp_rollout, rel=0, abs=ATOL)
    return ids_of(ours)


def agree_after_every_sync(pair, prompts, checkpoint: Path) -> list[list[tuple[int, ...]]]:
    """Ids of the checkpoint's weights, then of others, of yet others, and of the first others again."""
    found = [agree(pair, prompts)]
    for seed in (1, 2, 1):
        weights = other_weights(checkpoint, seed)
        for sampler in pair:
            sampler.load_weights(iter(weights))
        found.append(agree(pair, prompts))
    assert found[1] == found[3] and len({tuple(ids) for ids in found}) == 3, "the weights matter"
    return found


def test_weights_arrive_again_and_again(pair, prompts, tiny_student_dir):
    """Text and images: after each weight sync vLLM is transformers with the new weights, no cache remembers the old,
    and rollouts carry the version."""
    found = agree_after_every_sync(pair, prompts, tiny_student_dir)
    assert found[1][2] != found[1][3], "the image matters"
    assert {r.version for r in pair[0].sample(prompts[:1], GREEDY, responses=2, seed=0)} == {3}


def test_qwen3_vl_draws_alike_before_and_after_weights_arrive(tiny_qwen3_vl_dir, layout, tmp_path):
    """DeepStack features and interleaved mRoPE in vLLM are those of transformers."""
    pair, prompts = open_pair(tiny_qwen3_vl_dir), make_prompts(tiny_qwen3_vl_dir, tmp_path, size=(192, 32))
    before = agree(pair, prompts)
    weights = other_weights(tiny_qwen3_vl_dir, 1)
    for sampler in pair:
        sampler.load_weights(iter(weights))
    after = agree(pair, prompts)
    assert before != after and after[2] != after[3], "the weights and the image matter"


def test_images_that_need_resizing_are_the_same_pixels(pair, tiny_student_dir, tmp_path):
    """vLLM's own resize differs from the trainer's by up to 18 of 255 in a pixel; it gets resized images."""
    agree(pair, make_prompts(tiny_student_dir, tmp_path, size=(150, 70)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampling_temperature(pair, prompts, temperature):
    """...over the tokenizer's own ids, before top-p and top-k: what the trainer compares with."""
    config = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=0.9, top_k=40)
    vllm, transformers = pair
    for rollout in vllm.sample(prompts, config, responses=2, seed=3):
        with torch.no_grad():
            logits = all_logits(transformers, rollout) / temperature
        logp = logits.log_softmax(-1).gather(1, torch.tensor(rollout.response_ids.tolist())[:, None])[:, 0]
        assert rollout.logp_rollout == pytest.approx(logp.tolist(), rel=0, abs=ATOL)


def all_logits(sampler: TransformersSampler, rollout) -> torch.Tensor:
    """[response tokens, real ids]"""
    from vold.rollout.transformers.sampler import _append

    inputs = _append(sampler._inputs([rollout.prompt]), torch.tensor([rollout.response_ids.tolist()]))
    logits = sampler._model(**inputs, use_cache=False, logits_to_keep=len(rollout.response_ids) + 1).logits
    return logits[0, :-1, : sampler._vocabulary.size].float()


def test_siblings_and_prompts_draw_independently_and_again_the_same(pair, prompts):
    config = SamplingConfig(max_new_tokens=16, temperature=1.0)
    vllm, _ = pair
    first, again, other = (vllm.sample([prompts[0]] * 3, config, responses=4, seed=seed) for seed in (7, 7, 8))
    assert ids_of(first) == ids_of(again)
    drawn = ids_of([*first, *other])
    assert len(set(drawn)) == len(drawn), "no two of 24 share their random numbers"


def test_a_stream_draws_what_sample_draws_and_may_be_left(pair, prompts):
    """Whole groups, in the order they finish; what was under way when it is closed is gone without a trace."""
    config = SamplingConfig(max_new_tokens=32)
    vllm, _ = pair
    whole = vllm.sample(prompts * 4, config, responses=3, seed=11)
    groups = list(vllm.stream(prompts * 4, config, responses=3, seed=11))
    assert sorted(map(repr, groups)) == sorted(repr(whole[first : first + 3]) for first in range(0, len(whole), 3))
    left = vllm.stream(prompts * 4, config, responses=3, seed=11)
    assert next(left) == groups[0]
    left.close()
    assert vllm.sample(prompts * 4, config, responses=3, seed=11) == whole


def test_scores_are_those_of_transformers(pair, prompts):
    responses = [rollout.response_ids for rollout in pair[1].sample(prompts, GREEDY, responses=1, seed=0)]
    for prompt, response in zip(prompts, reversed(responses), strict=True):
        ours, theirs = (sampler.score(prompt, response) for sampler in pair)
        assert len(ours) == len(response) and ours == pytest.approx(theirs, rel=0, abs=ATOL)


def test_ids_without_a_token_and_image_pads_are_never_drawn(pair, prompts, tiny_student_dir):
    """With weights of zero, under which all ids are equally likely."""
    vllm, transformers = pair
    vllm.load_weights((name, torch.zeros_like(weight)) for name, weight in other_weights(tiny_student_dir, 0))
    rollouts = vllm.sample(prompts, SamplingConfig(max_new_tokens=64), responses=8, seed=0)
    vocabulary = transformers._vocabulary
    drawn = {token for rollout in rollouts for token in rollout.response_ids}
    assert drawn == set(range(vocabulary.size)) - set(vocabulary.banned_ids)
    logps = [logp for rollout in rollouts for logp in rollout.logp_rollout]
    assert logps == pytest.approx([-np.log(vocabulary.size)] * len(logps))
