"""examples/minimal_vold.py: it runs, it learns, and three of its steps equal the trainer's."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from support.steps import LONGEST, OPTIMIZER, VOCAB_SIZE, batch_of, make_groups, make_teacher, make_trainer
from vold.config.schema import DataConfig, ObjectiveConfig, PromptConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.grading import Grader
from vold.objectives import build_objective

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_vold.py"
EPS = 1e-5
REWARDS = [
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    [[0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0]],
    [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
]


@pytest.fixture(scope="module")
def minimal() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_three_steps_equal_the_trainers(minimal, tiny_student_dir, tiny_teacher_dir, layout):
    """Loss and every parameter after each step, on the same rollouts, in fp32: the trainer packs, shares prompts and
    runs Megatron; the example pads and runs transformers. Adam's eps is large enough that elements whose gradient is
    rounding do not move by a whole learning rate."""
    objective = build_objective(ObjectiveConfig(preset="vold", beta=0.3), LONGEST)
    trainer = make_trainer(tiny_student_dir, layout, objective=objective, eps=EPS)
    scorer = make_teacher(tiny_teacher_dir, layout)
    policy = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32)
    optimizer = minimal.build_optimizer(policy, OPTIMIZER.lr)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    before = {name: tensor.clone() for name, tensor in policy.named_parameters()}
    for step, rewards in enumerate(REWARDS):
        samples = objective.assign_token_weights(make_groups(rewards, seed=step))
        metrics = minimal.train_step(minimal.Models(policy, teacher, VOCAB_SIZE), samples, objective, optimizer)
        report = trainer.step(scorer.score(batch_of(samples, max_tokens=60))).metrics
        assert metrics["loss"] == pytest.approx(report["loss"], rel=1e-5, abs=1e-6)
        assert metrics["kl_teacher"] == pytest.approx(report["kl_teacher"], rel=1e-4)
        ours, trained = dict(policy.named_parameters()), dict(trainer.weights())
        trained.pop("lm_head.weight")  # tied to the embedding
        assert trained.keys() == {name for name in ours if "visual" not in name}
        for name, tensor in trained.items():
            update = (tensor - before[name]).norm()
            assert update > 0 and (tensor - ours[name]).norm() < 5e-5 * update, name
            assert (tensor - ours[name]).abs().max() < 2e-3 * OPTIMIZER.lr, name
    frozen = [name for name, parameter in policy.named_parameters() if "visual" in name]
    assert frozen and all(torch.equal(policy.get_parameter(name), before[name]) for name in frozen)


def test_rollouts_are_real_tokens_and_end_where_they_end(minimal, tiny_student_dir, world):
    tokenizer = AutoTokenizer.from_pretrained(tiny_student_dir, padding_side="left")
    policy = AutoModelForImageTextToText.from_pretrained(tiny_student_dir, dtype=torch.float32)
    problems = load_problems(DataConfig(path=world.data / "train.json", layout="orz", limit=4))
    prompts = build_prompts(problems, tokenizer, PromptConfig(suffix=""))
    torch.manual_seed(0)
    groups = minimal.sample_rollouts(policy, tokenizer, prompts)
    assert [len(siblings) for siblings in groups] == [minimal.RESPONSES] * 4
    for prompt, siblings in zip(prompts, groups, strict=True):
        for rollout in siblings:
            ids = list(rollout.response_ids)
            assert rollout.prompt == prompt and max(ids) < len(tokenizer) and policy.config.image_token_id not in ids
            assert tokenizer.eos_token_id not in ids[:-1]
            assert (ids[-1] == tokenizer.eos_token_id) == (rollout.finish_reason == "stop")
            assert rollout.finish_reason == "stop" or len(ids) == minimal.MAX_NEW_TOKENS
    with Grader() as grader:
        group = minimal.grade(groups[0], grader)
    assert len(group.rewards) == minimal.RESPONSES and set(group.rewards) <= {0.0, 1.0}


def test_it_runs_and_distils(minimal, tmp_path, capsys, monkeypatch):
    """On the untrained world every response fails: what can be learnt is the teacher."""
    for name, value in {"PROMPTS_PER_STEP": 8, "RESPONSES": 2, "MAX_NEW_TOKENS": 8}.items():
        monkeypatch.setitem(minimal.train.__globals__, name, value)
    history = minimal.train(*minimal.tiny_world(tmp_path / "world"), steps=15, lr=3e-3)
    assert len(capsys.readouterr().out.splitlines()) == len(history) == 15
    kl = [row["kl_teacher"] for row in history]
    assert sum(kl[-3:]) < 0.5 * sum(kl[:3])
