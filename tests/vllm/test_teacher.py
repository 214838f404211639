"""VllmTeacher inside the process beside the trainer's own fused Teacher: the same log-probs. Real vLLM."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from vold.config.schema import EngineConfig, SamplingConfig, VllmConfig
from vold.data.packing import pack
from vold.models.tokenizer import load_tokenizer
from vold.rollout import open_sampler
from vold.teacher import Teacher, VllmTeacher
from vold.types import Prompt, Rollout, Sample

pytestmark = pytest.mark.vllm

LONGEST = 48
SETTINGS = VllmConfig(kv_cache_gib=0.25, max_model_len=LONGEST, enforce_eager=True)


@pytest.fixture(scope="module")
def rollouts(tiny_teacher_dir) -> list[Rollout]:
    """Responses of one token and of the greatest length, also to the same prompt."""
    generator, ids = torch.Generator().manual_seed(0), len(load_tokenizer(tiny_teacher_dir))

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(ids, (count,), generator=generator).tolist())

    prompts = [Prompt(f"p{length}", draw(length), "") for length in (5, 17)]
    responses = [(prompts[0], 1), (prompts[0], 9), (prompts[0], LONGEST - 5), (prompts[1], 20)]
    return [Rollout(prompt, draw(length), (-1.0,) * length, "length", "") for prompt, length in responses]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_teachers_agree(rollouts, tiny_teacher_dir, layout, temperature):
    vllm = VllmTeacher(tiny_teacher_dir, SETTINGS, temperature=temperature)
    found = vllm.submit(rollouts).result()
    vllm.close()
    for rollout, ours, theirs in zip(
        rollouts, found, fused(tiny_teacher_dir, layout, rollouts, temperature), strict=True
    ):
        assert len(ours) == len(rollout.response_ids) and ours == pytest.approx(theirs, rel=0, abs=1e-4)


def test_groups_are_scored_while_others_are_drawn(tiny_student_dir, tiny_teacher_dir, layout, rollouts):
    """Two engines in one process, in turns."""
    student = EngineConfig(engine="vllm", vllm=SETTINGS)
    sampler = open_sampler(student, tiny_student_dir, dtype=torch.float32, device=torch.device("cpu"))
    teacher = VllmTeacher(tiny_teacher_dir, SETTINGS, temperature=1.0)
    prompts = [rollout.prompt for rollout in rollouts[2:]] * 4
    drawn, scores = [], []
    for group in sampler.stream(prompts, SamplingConfig(max_new_tokens=20), responses=2, seed=0):
        drawn += group
        scores += teacher.submit(group).result()
    assert len(drawn) == 16
    for ours, theirs in zip(scores, fused(tiny_teacher_dir, layout, drawn, 1.0), strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


def fused(checkpoint, layout, rollouts: list[Rollout], temperature: float) -> list[list[float]]:
    """Of each rollout, by `Teacher` on Megatron."""
    size = len(load_tokenizer(checkpoint))
    teacher = Teacher(checkpoint, layout, dtype=torch.float32, vocab_size=size, temperature=temperature)
    samples = [Sample(rollout.prompt, rollout.response_ids, 0.0, 0.0, 1.0) for rollout in rollouts]
    batch = teacher.score(pack(samples, max_tokens=1 << 20))
    return [
        micro.logp_teacher_N[micro.sequence_N == micro.sample_B.index(place)].tolist()
        for place in range(len(rollouts))
        for micro in batch.micro_batches
        if place in micro.sample_B
    ]
