"""Body of test_memory.py: measured memory of training steps, every live tensor counted, beside the planned memory.

Prints a row for each rank of each case: case, rank, measured MiB, planned MiB. A program of its own, because planning
replaces the process groups.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from support import tiny
from vold.config.schema import RlConfig
from vold.data.packing import pack
from vold.miniature.tokenizer import make_tokenizer
from vold.parallel.launch import initialise, shutdown
from vold.planning.meta_memory import LiveBytes
from vold.planning.stage_memory import stage_memories
from vold.planning.step_sizes import StepSizes
from vold.rollout.transformers.sampler import TransformersSampler
from vold.trainer.trainer import Trainer
from vold.types import Prompt, Sample

MIB = 2**20
PROMPT, RESPONSE, SIBLINGS, PROMPTS, GROUP = 32, 96, 4, 12, 32 + 4 * 95  # a group's tokens, packed
SHAPE = dict(vocab_size=6144, hidden_size=128, intermediate_size=384, num_hidden_layers=4, rope_parameters=tiny.ROPE)
CASES = {
    1: {
        "fp32": {},
        "bf16": {"dtype": "bfloat16"},
        "swiglu": {"parallel": {"recompute": "swiglu"}},
        "selective": {"parallel": {"recompute": "selective"}},
        "full": {"parallel": {"recompute": "full"}},
        "adapter": {"dtype": "bfloat16", "adapter": {"rank": 8}},
    },
    2: {
        "tp2 sp adapter": {"adapter": {"rank": 8}, "parallel": {"tp": 2, "sp": True}},
        "tp2 sp selective": {"parallel": {"tp": 2, "sp": True, "recompute": "selective"}},
        "pp2": {"parallel": {"pp": 2}},
        "pp2 vpp2": {"parallel": {"pp": 2, "vpp": 2}},
        "dp2 distributed": {"dtype": "bfloat16", "parallel": {"distributed_optimizer": True}},
    },
}


def config_of(case: dict, student: Path) -> RlConfig:
    common = dict(
        run_dir="unused",
        student=student,
        dtype="float32",
        data={"path": "unused", "layout": "orz"},
        steps=9,
        prompts_per_step=PROMPTS,
        microbatch_tokens=3 * GROUP,
        prompt={"max_tokens": PROMPT},
        rollout={"max_new_tokens": RESPONSE, "responses_per_prompt": SIBLINGS, "sequences_per_call": 16},
        objective={"preset": "grpo"},
        optimizer={"lr": 1e-4},
    )
    return RlConfig.model_validate(common | case)


def measured_training(config: RlConfig) -> float:
    """Bytes alive at the peak of the second step's forward and backward passes; the first makes Adam's moments."""
    layout = initialise(**config.parallel.model_dump(), seed=0)
    ids, logps = tuple(range(RESPONSE)), (0.0,) * RESPONSE
    samples = [
        Sample(Prompt(str(number), tuple(range(PROMPT)), ""), ids, (-1.0) ** sibling, 1e-3, 0.0, logp_rollout=logps)
        for number in range(PROMPTS)
        for sibling in range(SIBLINGS)
    ]
    with LiveBytes() as live:
        dtype = getattr(torch, config.dtype)
        numbers = {"steps": 9, "dtype": dtype, "vocab_size": SHAPE["vocab_size"]}
        trainer = Trainer(config.student, layout, config.optimizer, adapter=config.adapter, **numbers)
        trainer.phases = PeakBeforeUpdate(live)
        batch = pack(samples, max_tokens=config.microbatch_tokens, replicas=trainer.replicas)
        for _ in range(2):
            live.peak = live.now
            trainer.step(batch)
    return trainer.phases.peak


class PeakBeforeUpdate:
    """Stands in for PhaseTimers: records the peak when the optimizer phase begins."""

    def __init__(self, live: LiveBytes):
        self.live, self.peak, self.name = live, 0, ""

    def __call__(self, name: str, **_options):
        if name == "optimizer":
            self.peak = self.live.peak
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return None


def planned_training(config: RlConfig, stage: int, world: int) -> float:
    memory = stage_memories(StepSizes(config, world), "cpu")[stage]
    state = sum(memory.resident[name] for name in ("weights", "gradients", "optimizer"))
    return state + sum(memory.phases["train"].values())


def measured_drawing(config: RlConfig) -> float:
    """Bytes that drawing responses of full length adds to the sampler's weights."""
    sampler = TransformersSampler(config.student, dtype=getattr(torch, config.dtype), device=torch.device("cpu"))
    sampler._vocabulary = replace(sampler._vocabulary, stop_ids=())  # responses of full length
    prompts = [Prompt(str(number), tuple(range(5, 5 + PROMPT)), "") for number in range(4)]
    with LiveBytes() as live:
        rollouts = sampler.sample(prompts, config.rollout, responses=SIBLINGS, seed=0)
    assert min(len(rollout.response_ids) for rollout in rollouts) == RESPONSE
    return live.peak


def save_student(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {**tiny.TEXT, **SHAPE, "vocab_size": vocab_size, "eos_token_id": tokenizer.eos_token_id}
    Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(folder: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    student = save_student(folder / f"student{rank}", SHAPE["vocab_size"])
    configs = {name: config_of(case, student) for name, case in CASES[world].items()}
    measured = {name: measured_training(config) for name, config in configs.items()}
    shutdown()
    for name, config in configs.items():
        training = planned_training(config, rank * config.parallel.pp // world, world)
        print(f"{name},{rank},{measured[name] / MIB:.2f},{training / MIB:.2f}", flush=True)
    if world == 1:  # one row of the head is padding, which is never drawn, and the stop token: all go to the end
        config = config_of({}, save_student(folder / "sampled", len(make_tokenizer()) + 1))
        drawing = sum(stage_memories(StepSizes(config, 1), "cpu")[0].phases["rollout"].values())
        print(f"rollout,{rank},{measured_drawing(config) / MIB:.2f},{drawing / MIB:.2f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
