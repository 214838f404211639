"""Replayed choices of a mixture's experts: a router's own change no bit, others what they change in transformers, on
every layout; and how often sampler and trainer choose otherwise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from router_replay_ranks import (
    CHOSEN,
    LAYERS,
    LAYOUTS,
    forced,
    noted,
    open_trainer,
    r2_step,
    rank,
    rerouted,
    samples,
    take_step,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from support import ranks, tiny
from support.steps import VOCAB_SIZE, relative
from vold.config.schema import SamplingConfig
from vold.data.packing import pack
from vold.models.checkpoint_dir import export_checkpoint
from vold.objectives import split_minibatches
from vold.rollout import TransformersSampler
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl
from vold.types import Prompt


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return tiny.save(tiny.qwen3_moe(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def chatting(tiny_teacher_dir, tmp_path_factory) -> Path:
    """A mixture with a tokenizer and a chat template."""
    target = tmp_path_factory.mktemp("chatting") / "c"
    shutil.copytree(tiny_teacher_dir, target)
    settings = json.loads((target / "config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("model_type", "architectures", "layer_types")}
    mixture = tiny.MIXTURE | {"moe_intermediate_size": 32}
    tiny.perturbed(Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings, **mixture)).save_pretrained(target)
    return target


def read_ids(sample) -> torch.Tensor:
    return torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids[:-1].tolist()]])


def logps(model, sample) -> torch.Tensor:
    logits = model(read_ids(sample)).logits[0, len(sample.prompt.token_ids) - 1 :, :VOCAB_SIZE]
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids.tolist())[:, None])[:, 0]


def own_choices(model, sample) -> np.ndarray:
    """[tokens, layers, k] of transformers."""
    with noted(model) as found, torch.no_grad():
        model(read_ids(sample))
    return torch.stack(found, 1).numpy().astype(np.int16)


def expected_gradients(model, each, old=None) -> dict[str, torch.Tensor]:
    """GRPO on materialised logits, each sequence through its `experts`. old: log-probs of the ratios' denominators."""
    for index, sample in enumerate(each):
        if not sample.pg_weight:
            continue
        experts = own_choices(model, sample) if sample.experts is None else sample.experts
        with forced(model, experts):
            logp = logps(model, sample)
        before = logp.detach() if old is None else old[index]
        ratio = (logp - before).exp()
        surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
        (-sample.pg_weight * surrogate).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_sampler_notes_what_its_routers_choose(chatting):
    sampler = TransformersSampler(chatting, dtype=torch.float32, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(chatting, dtype=torch.float32)
    prompts = [Prompt("a", (5, 6, 7, 8, 9), ""), Prompt("b", (9, 4), "")]
    rollouts = sampler.sample(prompts, SamplingConfig(max_new_tokens=20), responses=3, seed=1)
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 2, "some end early"
    for rollout in rollouts:
        assert np.array_equal(rollout.experts, own_choices(model, rollout))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_own_choices_change_no_bit(recompute, student, layout):
    model, layout = AutoModelForCausalLM.from_pretrained(student), replace(layout, recompute=recompute)
    noted_samples = [replace(s, experts=own_choices(model, s)) for s in samples()]
    (plain, before), (compared, counted), (replayed, metrics) = (
        take_step(open_trainer(student, layout, mode), [each])
        for mode, each in ((None, samples()), (None, noted_samples), ("R3", noted_samples))
    )
    assert all(torch.equal(plain[name], compared[name]) for name in plain)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
    assert "router_mismatch" not in before and counted["router_mismatch"] == metrics["router_mismatch"] == 0.0


def test_other_choices_change_what_they_change_in_transformers(student, layout):
    """Also the share of pairs of a token and a layer in which they are others."""
    each = rerouted(share=1.0)
    found, metrics = take_step(open_trainer(student, layout, "R3"), [each])
    model = AutoModelForCausalLM.from_pretrained(student)
    expected = expected_gradients(model, each)
    assert relative(found, expected) < 1e-4
    plain, of_plain = take_step(open_trainer(student, layout, None), [each])
    assert relative(plain, expected) > 0.1
    assert relative(plain, take_step(open_trainer(student, layout, None), [samples()])[0]) == 0.0
    assert 0.8 < metrics["router_mismatch"] <= 1.0 and 0.8 < of_plain["router_mismatch"] <= 1.0


def test_the_share_of_other_choices_is_counted_once_for_each_token(student, layout):
    """A prompt that siblings share counts once; of nine of ten tokens here the router's own choice."""
    model, draw = AutoModelForCausalLM.from_pretrained(student), np.random.default_rng(1)
    each, changed, total = [], 0, 0
    prompts: dict[str, np.ndarray] = {}
    for sample in samples():
        own = own_choices(model, sample)
        first = sample.prompt.id not in prompts
        length = len(sample.prompt.token_ids)
        other = (draw.random(own.shape[:2]) < 0.1)[..., None]
        experts = np.where(other, (own + 1) % 8, own)
        experts[:length] = prompts.setdefault(sample.prompt.id, experts[:length])
        each.append(replace(sample, experts=experts))
        differs = (np.sort(experts, -1) != np.sort(own, -1)).any(-1)
        changed += int(differs[0 if first else length :].sum())
        total += differs[0 if first else length :].size
    for recompute in ("none", "full"):
        _, metrics = take_step(open_trainer(student, replace(layout, recompute=recompute), None), [each], 999)
        assert metrics["router_mismatch"] == pytest.approx(changed / total, rel=1e-12)


def test_every_layout_of_two_ranks_replays_alike(student, layout, tmp_path):
    expected, of_one = take_step(open_trainer(student, layout, "R3"), [rerouted()])
    expected_r2, compared = r2_step(student, layout), 0
    ranks.run(2, rank, student, tmp_path, logs=tmp_path / "logs")
    for number, sizes in enumerate(LAYOUTS):
        found = load_file(tmp_path / f"{number}.safetensors")
        metrics = json.loads((tmp_path / f"{number}.json").read_text())
        assert relative(found, expected) <= 1e-5, sizes
        if again := load_file(tmp_path / f"{number}-r2.safetensors"):
            compared += 1
            assert relative(again, expected_r2) <= 1e-4, sizes
        dp2 = sizes.keys() == {"ep"}  # where a prompt may be read by both replicas
        assert metrics["router_mismatch"] == pytest.approx(of_one["router_mismatch"], abs=0.1 if dp2 else 1e-12), sizes
    assert compared == 2


def test_r2_trains_through_the_experts_of_before_the_first_update(student, layout, tmp_path):
    """Layers that are computed again, too, as before the update."""
    parts, numbers = split_minibatches(samples(minibatches=2)), {"lr": 0.02}
    layout = replace(layout, recompute="full")
    found, _ = take_step(open_trainer(student, layout, "R2", **numbers), parts)
    plain, _ = take_step(open_trainer(student, layout, None, **numbers), parts)
    once = open_trainer(student, layout, None, **numbers)
    take_step(once, parts[:1])
    export_checkpoint(student, tmp_path / "moved", once.weights())
    before, moved = (AutoModelForCausalLM.from_pretrained(path) for path in (student, tmp_path / "moved"))
    through = [replace(s, experts=own_choices(before, s)) for s in parts[1]]
    changed = [(own_choices(moved, s) != s.experts).mean() for s in through]
    assert max(changed) > 0.05, "the update changes choices"
    with torch.no_grad():
        old = [logps(before, sample) for sample in through]
    expected = expected_gradients(moved, through, old)
    assert relative(found, expected) < 1e-3
    assert relative(plain, expected) > 0.01


def test_choices_of_another_length_are_named(student, layout):
    sample = rerouted()[0]
    with pytest.raises(ValueError, match=r"p0: the sampler chose experts \(.*\) .* and the trainer reads"):
        pack([replace(sample, experts=sample.experts[1:])], max_tokens=99)


def test_a_run_replays_and_says_how_often_it_would_have_chosen_otherwise(chatting, load, tmp_path):
    overrides = [f"student={chatting}", "steps=2", "save_every=0", "evaluation.every=0", "evaluation.sets={}"]
    overrides += ["dtype=bfloat16", "parity_limit=9"]
    first = {}
    for mode in ("R3", "null"):
        config = load("rl", tmp_path / mode, *overrides, f"rollout.router_replay={mode}")
        train_rl(config)
        first[mode], second = read_rows(config.run_dir / "metrics.jsonl")
        assert 0 < first[mode]["router_mismatch"] < 0.2 and 0 < second["router_mismatch"] < 0.2
    # Of the same responses: what is left is bfloat16's rounding elsewhere.
    assert first["R3"]["mismatch_mean"] < 0.7 * first["null"]["mismatch_mean"]


def test_what_cannot_be_replayed_is_one_line(chatting, load, tmp_path):
    for overrides, message in (
        (["rollout.router_replay=R3"], r"R3 is of a mixture of experts and student = .* has none; leave it out"),
        ([f"student={chatting}", "rollout.router_replay=R2"], r"R2 replays the choices .*: set minibatches > 1"),
        (
            [f"student={chatting}", "rollout.router_replay=R3", "rollout.engine=vllm"],
            r"R3 needs the sampler's choices: vLLM .*; set rollout.engine=transformers",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            train_rl(load("rl", tmp_path / "run", *overrides))
        assert "\n" not in str(error.value)


assert tiny.MIXTURE["num_experts_per_tok"] == CHOSEN
