"""Body of test_memory.py: measured memory of training steps, every live tensor counted, beside the planned memory.

Prints a row for each rank of each case: case, rank, measured MiB, planned MiB. A program of its own, because planning
replaces the process groups.
"""

from __future__ import annotations

import os
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from support import tiny
from vold.config.schema import RlConfig
from vold.data.packing import EncodedPrompt, TextPromptEncoder, pack
from vold.miniature.tokenizer import make_tokenizer
from vold.models.architecture import Architecture
from vold.models.images import image_grids
from vold.models.positions import mrope_positions
from vold.parallel.launch import initialise, shutdown
from vold.planning.meta_memory import LiveBytes
from vold.planning.stage_memory import stage_memories
from vold.planning.step_sizes import StepSizes
from vold.rollout.transformers.sampler import TransformersSampler
from vold.trainer import offload
from vold.trainer.optimizer import _chain
from vold.trainer.trainer import Trainer
from vold.types import Picture, Prompt, Sample

MIB = 2**20
PROMPT, RESPONSE, SIBLINGS, PROMPTS, GROUP = 32, 96, 4, 12, 32 + 4 * 95  # a group's tokens, packed
SHAPE = dict(vocab_size=6144, hidden_size=128, intermediate_size=384, num_hidden_layers=4, rope_parameters=tiny.ROPE)
VISION = dict(tiny.VISION, depth=4, hidden_size=128, intermediate_size=352, num_heads=4, out_hidden_size=128)
if find_spec("bitsandbytes"):
    QUANTISED = {"4 bits": {"dtype": "bfloat16", "adapter": {"rank": 8, "base_bits": 4}}}
else:
    QUANTISED = {}
CASES = {
    1: {
        **QUANTISED,
        "fp32": {},
        "bf16": {"dtype": "bfloat16"},
        "swiglu": {"parallel": {"recompute": "swiglu"}},
        "selective": {"parallel": {"recompute": "selective"}},
        "full": {"parallel": {"recompute": "full"}},
        "adapter": {"dtype": "bfloat16", "adapter": {"rank": 8}},
        "optimizer offloaded": {"dtype": "bfloat16", "optimizer": {"lr": 1e-4, "offload": True}},
        "fp32 optimizer offloaded": {"optimizer": {"lr": 1e-4, "offload": True}},
        "activations offloaded": {"parallel": {"offload_activations": True}},
        "tower": {"train": ["language_model", "visual"]},
        "tower recomputed": {"train": ["language_model", "visual"], "parallel": {"recompute": "full"}},
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


class HostBytes:
    """Counts what `offload` moves to CPU memory, which here is the only memory, and keeps it out of LiveBytes."""

    def __init__(self):
        self.now = self.peak = 0
        self._on_host, self._step = offload._on_host, offload.OffloadedAdamW.step
        offload._on_host = self.on_host
        offload.OffloadedAdamW.step = self.step

    def on_host(self, tensor: torch.Tensor, **options) -> torch.Tensor:
        with _disable_current_modes():
            host = self._on_host(tensor, **options)
        self.now += host.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(host.untyped_storage(), self._free, host.nbytes)
        return host

    def step(self, *arguments):
        """Adam's moments are made there."""
        with _disable_current_modes():
            return self._step(*arguments)

    def _free(self, size: int) -> None:
        self.now -= size

    def close(self, trainer: Trainer) -> int:
        """The peak, with Adam's moments where they are in CPU memory."""
        offload._on_host, offload.OffloadedAdamW.step = self._on_host, self._step
        moments = 0
        for inner in _chain(trainer.optimizer):
            if not isinstance(inner.optimizer, offload.OffloadedAdamW):
                continue
            states = inner.optimizer.state.values()
            moments += sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
        return self.peak + moments


class AllImage(TextPromptEncoder):
    """Prompts that are one image, of as many tokens as a prompt may have."""

    def __init__(self, arch: Architecture):
        self.arch = arch

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        pixels = torch.randn(4 * PROMPT, 96)
        picture = Picture(prompt.id, pixels, (1, 8, PROMPT // 2))
        ids = [tiny.IMAGE_PAD] * PROMPT
        positions = mrope_positions(torch.tensor(ids), image_grids([picture]), self.arch)
        return EncodedPrompt(np.array(ids), positions, (picture,))

    def length(self, prompt: Prompt) -> int:
        return PROMPT


def measured_training(config: RlConfig) -> tuple[float, float]:
    """Bytes alive at the peak of the second step's forward and backward passes; the first makes Adam's moments. And
    bytes in CPU memory."""
    layout = initialise(**config.parallel.model_dump(), seed=0)
    ids, logps = tuple(range(RESPONSE)), (0.0,) * RESPONSE
    samples = [
        Sample(Prompt(str(number), tuple(range(PROMPT)), ""), ids, (-1.0) ** sibling, 1e-3, 0.0, logp_rollout=logps)
        for number in range(PROMPTS)
        for sibling in range(SIBLINGS)
    ]
    host = HostBytes()
    with LiveBytes() as live:
        dtype = getattr(torch, config.dtype)
        numbers = {"steps": 9, "dtype": dtype, "vocab_size": SHAPE["vocab_size"], "train": config.train}
        trainer = Trainer(config.student, layout, config.optimizer, adapter=config.adapter, **numbers)
        trainer.phases = PeakBeforeUpdate(live)
        encode = AllImage(trainer.chunks[0].arch) if config.train else TextPromptEncoder()
        if config.train:
            samples = [replace(sample, prompt=replace(sample.prompt, images=(Path("x"),))) for sample in samples]
        batch = pack(samples, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=encode)
        for _ in range(2):
            live.peak = live.now
            trainer.step(batch)
    return trainer.phases.peak, host.close(trainer)


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


def planned_training(config: RlConfig, stage: int, world: int) -> tuple[float, float]:
    memory = stage_memories(StepSizes(config, world), "cpu")[stage]
    state = sum(memory.resident[name] for name in ("weights", "gradients", "optimizer"))
    return state + sum(memory.phases["train"].values()), memory.host


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


def seeing_student():
    """A Qwen2.5-VL whose tower is as wide as its language model."""
    text = {**tiny.TEXT, **SHAPE, "rope_parameters": {**tiny.ROPE, "mrope_section": [4, 6, 6]}}
    ids = {**tiny.SPECIAL_IDS, "tie_word_embeddings": True}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=dict(VISION), **ids))


def main(folder: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    student = save_student(folder / f"student{rank}", SHAPE["vocab_size"])
    seeing = tiny.save(seeing_student(), folder / f"seeing{rank}")
    students = {name: seeing if case.get("train") else student for name, case in CASES[world].items()}
    configs = {name: config_of(case, students[name]) for name, case in CASES[world].items()}
    measured = {name: measured_training(config) for name, config in configs.items()}
    shutdown()
    for name, config in configs.items():
        planned = planned_training(config, rank * config.parallel.pp // world, world)
        for where, found, training in zip(("", " in CPU memory"), measured[name], planned, strict=True):
            if found or training:
                print(f"{name}{where},{rank},{found / MIB:.2f},{training / MIB:.2f}", flush=True)
    if world == 1:  # one row of the head is padding, which is never drawn, and the stop token: all go to the end
        config = config_of({}, save_student(folder / "sampled", len(make_tokenizer()) + 1))
        drawing = sum(stage_memories(StepSizes(config, 1), "cpu")[0].phases["rollout"].values())
        print(f"rollout,{rank},{measured_drawing(config) / MIB:.2f},{drawing / MIB:.2f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
