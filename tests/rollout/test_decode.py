"""Our decoding loop draws what transformers' `generate` draws, and its log-probabilities are the model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from support.steps import ids_of
from vold.config.schema import SamplingConfig
from vold.rollout import TransformersSampler
from vold.rollout.transformers import decode, shared_prompt
from vold.types import Prompt

GREEDY = SamplingConfig(max_new_tokens=21, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=21, temperature=1.0)


@pytest.fixture(scope="module", params=["tiny_student_dir", "tiny_qwen3_5_dir"])
def sampler(request) -> TransformersSampler:
    """Qwen2.5-VL's layers, and layers with recurrent states."""
    checkpoint = request.getfixturevalue(request.param)
    sampler = TransformersSampler(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():  # untrained logits are flat: ties would be decided by rounding
        for name, parameter in sampler._model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(4)  # a state that lasts
            elif "norm" not in name:
                parameter.mul_(3)
    return sampler


def prompts(count: int = 4) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5, 14, 7, 2][:count]
    return [Prompt(str(n), tuple(torch.randint(5, 50, (n,), generator=generator).tolist()), "") for n in lengths]


def with_image(tmp_path) -> Prompt:
    from PIL import Image

    from vold.miniature.tokenizer import CLOSE, IMAGE, OPEN, TOKEN_ID

    Image.new("RGB", (196, 28), (200, 30, 90)).save(tmp_path / "a.png")
    ids = (7, TOKEN_ID[OPEN], TOKEN_ID[IMAGE], TOKEN_ID[CLOSE], 8, 9)
    return Prompt("image", ids, "", images=(tmp_path / "a.png",))


def generated(sampler: TransformersSampler, prompt: Prompt, config: SamplingConfig) -> list[int]:
    """The greedy response of transformers' own loop, one prompt at a time."""
    inputs = sampler._inputs([prompt])
    vocabulary = sampler._vocabulary
    real = list(range(vocabulary.size, sampler._model.get_output_embeddings().weight.shape[0]))
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=list(vocabulary.stop_ids),
        pad_token_id=0,
        suppress_tokens=[*real, *vocabulary.banned_ids],
    )
    out = sampler._model.generate(**inputs, generation_config=settings)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_ids_are_those_of_generate(sampler, tmp_path):
    """Left-padded in one batch, with an image in it; responses that end early leave the batch."""
    asked = [*prompts(), with_image(tmp_path)]
    for rollout in sampler.sample(asked, GREEDY, responses=1, seed=0):
        assert list(rollout.response_ids) == generated(sampler, rollout.prompt, GREEDY)


def test_recorded_logprobs_are_the_models(sampler, tmp_path):
    """Siblings share one reading of their prompt; the model reads each whole sequence alone."""
    rollouts = sampler.sample([*prompts(), with_image(tmp_path)], SAMPLED, responses=3, seed=1)
    assert [r.prompt.id for r in rollouts[:6]] == ["3"] * 3 + ["9"] * 3
    assert len({tuple(r.response_ids) for r in rollouts[:3]}) == 3
    for rollout in rollouts:
        expected = sampler.score(rollout.prompt, rollout.response_ids)
        torch.testing.assert_close(torch.tensor(rollout.logp_rollout), torch.tensor(expected), rtol=0, atol=2e-5)


def test_the_batch_size_of_a_call_changes_no_greedy_response(sampler):
    whole = sampler.sample(prompts(6), GREEDY, responses=2, seed=0)
    parts = sampler.sample(prompts(6), GREEDY.model_copy(update={"sequences_per_call": 5}), responses=2, seed=0)
    assert ids_of(whole) == ids_of(parts)


def test_finished_responses_leave_the_batch(sampler, monkeypatch):
    """Every id stops: after the first look for finished responses nothing is left to draw."""
    rows = []
    forward = sampler._model.forward

    def watched(*args, **kwargs):
        rows.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(sampler._model, "forward", watched)
    everything = replace(sampler._vocabulary, stop_ids=tuple(range(sampler._vocabulary.size)))
    monkeypatch.setattr(sampler, "_vocabulary", everything)
    rollouts = sampler.sample(prompts(2), SAMPLED, responses=3, seed=0)
    assert all(len(r.response_ids) == 1 and r.finish_reason == "stop" for r in rollouts)
    assert rows == [2] + [6] * (decode.SWEEP_EVERY - 1)  # two prompts read once, then six responses until the look


def test_padded_and_banned_ids_are_never_drawn_and_the_seed_decides(sampler):
    config = SAMPLED.model_copy(update={"temperature": 5.0})
    first, again, other = (sampler.sample(prompts(), config, responses=8, seed=seed) for seed in (3, 3, 4))
    assert ids_of(first) == ids_of(again) != ids_of(other)
    drawn = {token for rollout in first for token in rollout.response_ids}
    assert max(drawn) < sampler._vocabulary.size and not drawn & set(sampler._vocabulary.banned_ids)


def test_top_k_restricts_the_draw_but_not_the_logprob(sampler):
    config = SAMPLED.model_copy(update={"top_k": 1})
    greedy = sampler.sample(prompts(), GREEDY, responses=1, seed=0)
    chosen = sampler.sample(prompts(), config, responses=1, seed=7)
    assert ids_of(chosen) == ids_of(greedy)
    assert chosen[0].logp_rollout == pytest.approx(greedy[0].logp_rollout, abs=1e-5) and min(chosen[0].logp_rollout) < 0


def test_responses_read_their_prompt_where_it_is_or_a_copy_of_their_own(monkeypatch, sampler):
    """A CPU's cache and a GPU's draw the same, also where responses leave the batch and the cache outgrows its room."""
    asked, config = prompts(6), SAMPLED.model_copy(update={"sequences_per_call": 16})
    monkeypatch.setattr(decode, "SWEEP_EVERY", 3)
    stopping = replace(sampler._vocabulary, stop_ids=(*sampler._vocabulary.stop_ids, 11, 12, 13))
    monkeypatch.setattr(sampler, "_vocabulary", stopping)
    expected = sampler.sample(asked, config, responses=5, seed=4)
    assert len({len(rollout.response_ids) for rollout in expected}) > 3
    for layer in (decode.SharedPromptLayer, decode.PreallocatedLayer):
        monkeypatch.setattr(shared_prompt, "SPARE_TOKENS", 2)
        monkeypatch.setattr(decode.PreallocatedLayer, "SPARE_TOKENS", 2)
        monkeypatch.setattr(decode, "_layer_class", lambda _device, layer=layer: layer)
        drawn = sampler.sample(asked, config, responses=5, seed=4)
        assert ids_of(drawn) == ids_of(expected)


def test_what_is_answered_is_kept_back_and_the_others_draw_as_before(sampler):
    whole = sampler.sample(prompts(), SAMPLED, responses=2, seed=3)
    left = list(sampler.stream(prompts(), SAMPLED, responses=2, seed=3, answered={"9", "14"}))
    assert [rollout for group in left for rollout in group] == [*whole[:2], *whole[4:6]]
