"""One training step of a published model on the fake device: build, teacher, forward, backward, clip, AdamW, export.

T packed tokens of a micro-batch, N of them with a target, P prompt tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vold.config.schema import ObjectiveConfig, OptimizerConfig
from vold.data.packing import EncodedPrompt, Replicas, encode_text, pack
from vold.models import student, vision
from vold.models.architecture import Architecture
from vold.models.flops import segment_flops
from vold.models.layer_ops import layer_ops
from vold.models.positions import expand_image_tokens, mrope_positions
from vold.objectives import build_objective
from vold.parallel.launch import Layout, _fix_order_of_sums, fake_layout, shutdown
from vold.teacher.scorer import Teacher
from vold.trainer.trainer import Trainer
from vold.types import Batch, Picture, Prompt, Sample

from .models import REAL_IDS, save_config
from .trace import Trace, tracing

IMAGE = Path("image.png")


@dataclass(frozen=True)
class Case:
    """The sizes and choices of a step. prompts × responses sequences; images: patches (height, width) of the image of
    each prompt, none in a text model. tp to deterministic: see Layout, of rank 0 of `world` processes. layers: fewer
    than the models have; blocks: fewer than the vision tower has."""

    student: str = "qwen3-1.7b"
    teacher: str | None = "qwen3-8b"
    offload: bool = False
    preset: str = "vold"
    prompts: int = 2
    responses: int = 8
    prompt_tokens: int = 256
    response_tokens: int = 1536
    microbatch_tokens: int = 16384
    image_patches: tuple[int, int] | None = None
    world: int = 1
    tp: int = 1
    sp: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    deterministic: bool = False
    layers: int | None = None
    blocks: int | None = None


@dataclass
class Step:
    """What was run: its trace, the batch (on the CPU, with numbers), and the objects. exported: the name and the size
    of each weight that is on the device."""

    case: Case
    trace: Trace
    batch: Batch
    branches: str
    parameters: int
    arch: Architecture
    teacher_arch: Architecture | None
    exported: dict[str, tuple[int, ...]]

    @property
    def targets(self) -> int:
        return sum(micro.target_N.numel() for micro in self.batch.micro_batches)


def run_step(case: Case) -> Step:
    """Execute a step on the fake device. `install` comes first; process groups are replaced and destroyed."""
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder, _layout(case) as layout:
        student = save_config(case.student, Path(folder), case.layers, case.blocks)
        arch = Architecture.from_pretrained(student)
        batch = make_batch(case, arch, layout.dp)
        with _no_weights(), tracing(trace) as mode:
            trainer = _trainer(case, student, layout)
            trainer.phases = trace  # type: ignore[assignment]
            teacher = None
            if case.teacher is not None:
                with trace.in_phase("build_teacher"):
                    teacher = _teacher(case, save_config(case.teacher, Path(folder), case.layers), layout)
            fake = _fake(batch, mode)
            if teacher is not None:
                with trace.in_phase("teacher"):
                    fake = teacher.score(fake)
            with trace.in_phase("step"):
                trainer.step(fake)
            with trace.in_phase("export"):
                exported = {name: tuple(x.shape) for name, x in trainer.weights() if x.is_cuda}
    return Step(
        case=case,
        trace=trace,
        batch=batch,
        branches=str(layer_ops("cuda", torch.bfloat16)),
        parameters=sum(parameter.numel() for parameter in trainer.parameters.values()),
        arch=arch,
        teacher_arch=None if teacher is None else teacher._chunks[0].arch,
        exported=exported,
    )


def make_batch(case: Case, arch: Architecture, replicas: int = 1) -> Batch:
    """The first replica's share of the step, on the CPU."""
    encode = _ImageEncoder(case, arch) if case.image_patches else encode_text
    share = Replicas(replicas, 0, partial(segment_flops, arch))
    return pack(_samples(case), max_tokens=case.microbatch_tokens, encode=encode, replicas=share)


@contextmanager
def _layout(case: Case) -> Iterator[Layout]:
    layout = fake_layout(0, case.world, tp=case.tp, pp=1, sp=case.sp, **_choices(case))
    from megatron.core import parallel_state

    for name in ("get_data_parallel_group", "get_expert_data_parallel_group"):  # no gloo in a fake world
        setattr(parallel_state, f"{name}_gloo", lambda *_args, _name=name, **_options: getattr(parallel_state, _name)())
    _fix_order_of_sums(case.deterministic)
    try:
        yield replace(layout, device=torch.device("cuda", 0))
    finally:
        _fix_order_of_sums(False)
        shutdown()


def _choices(case: Case) -> dict[str, Any]:
    names = ("distributed_optimizer", "recompute", "deterministic")
    return {name: getattr(case, name) for name in names}


def _trainer(case: Case, student: Path, layout: Layout) -> Trainer:
    return Trainer(
        student,
        layout,
        OptimizerConfig(lr=1e-6, schedule="constant", warmup_steps=0),
        steps=10,
        dtype=torch.bfloat16,
        vocab_size=REAL_IDS,
        objective=_objective(case),
    )


def _objective(case: Case):
    return build_objective(ObjectiveConfig(preset=case.preset, beta=0.3), case.response_tokens)


def _teacher(case: Case, checkpoint: Path, layout: Layout) -> Teacher:
    return Teacher(
        checkpoint,
        layout,
        dtype=torch.bfloat16,
        vocab_size=REAL_IDS,
        offload=case.offload,
        full_distributions=_objective(case).divergence is not None,
    )


def _samples(case: Case) -> list[Sample]:
    """Every third response is right: its prompt's others are distilled. Lengths differ a little."""
    draw = random.Random(0)
    images = (IMAGE,) if case.image_patches else ()
    pads = (151652, 151655, 151653) if case.image_patches else ()
    samples = []
    for number in range(case.prompts):
        ids = (*pads, *(draw.randrange(8, 150000) for _ in range(case.prompt_tokens + number)))
        prompt = Prompt(f"prompt{number}", ids, "", "1", images=images)
        for sibling in range(case.responses):
            right, length = (sibling + number) % 3 == 0, case.response_tokens - 17 * sibling
            response = [draw.randrange(8, 150000) for _ in range(length)]
            kl_weight = 0.0 if right or case.teacher is None else 0.3 / length
            samples.append(Sample(prompt, response, 1.0 if right else -0.5, 1 / length, kl_weight, [-1.0] * length))
    return samples


class _ImageEncoder:
    """A prompt with one image of the case's size, as a vision-language model reads it; the pixels are zeros."""

    def __init__(self, case: Case, arch: Architecture):
        assert case.image_patches is not None
        tower = arch.vision.tower_config
        self._arch, self._grid = arch, (1, *case.image_patches)
        width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        self._pixels = torch.zeros(case.image_patches[0] * case.image_patches[1], width, device="cpu")

    def length(self, prompt: Prompt) -> int:
        return len(self(prompt).prompt_ids)

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        grid = torch.tensor([self._grid])
        ids = expand_image_tokens(prompt.token_ids.tolist(), grid, self._arch)
        return EncodedPrompt(ids, mrope_positions(torch.tensor(ids), grid, self._arch), (self._picture(prompt),))

    def _picture(self, prompt: Prompt) -> Picture:
        return Picture(prompt.id, self._pixels, self._grid)


def _fake(record: Any, mode: FakeTensorMode) -> Any:
    """A record of the batch whose tensors are fake, with their numbers."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = mode.from_tensor(value)
            with torch._C._DisableTorchDispatch():
                changed[field.name].numbers = value.contiguous()
        elif field.name in ("tokens", "micro_batches"):
            changed[field.name] = (
                tuple(_fake(v, mode) for v in value) if isinstance(value, tuple) else _fake(value, mode)
            )
    assert is_dataclass(record)
    return replace(record, **changed)


@contextmanager
def _no_weights() -> Iterator[None]:
    """Inside, checkpoints are not read: parameters stay as they were allocated."""
    read = student.load_pretrained, student.check_sizes, vision._vision_tensors
    student.load_pretrained = student.check_sizes = lambda *_args: None
    vision._vision_tensors = _tower_tensors
    try:
        yield
    finally:
        student.load_pretrained, student.check_sizes, vision._vision_tensors = read


def _tower_tensors(path: Path, _expected: set[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's tower, without numbers."""
    arch = Architecture.from_pretrained(path)
    with torch.device("cpu"):
        tower = vision.TOWERS[arch.model_type]._from_config(arch.vision.tower_config, dtype=torch.bfloat16)
    return tower.state_dict()
