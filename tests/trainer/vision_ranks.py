"""Samples and the rank function of test_vision_training.py: text prompts, prompts with one and two images, siblings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pytest import approx
from safetensors.torch import load_file, save_file

from support import tiny
from support.steps import OPTIMIZER, relative
from vold.config.schema import VisionConfig
from vold.data.packing import EncodedPrompt, TextPromptEncoder, pack
from vold.models.architecture import Architecture
from vold.models.images import image_grids
from vold.models.positions import expand_image_tokens, mrope_positions
from vold.models.weights import export_weights
from vold.parallel.launch import initialise, shutdown
from vold.run.job import Job
from vold.run.timers import PhaseTimers
from vold.teacher import Teacher, VisualAdvantageTeacher
from vold.train.image_sensitivity import ImageSensitivity
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.metrics import SUM_NAMES
from vold.trainer.trainer import Trainer
from vold.types import Picture, Prompt, Sample

IDS = 120  # below the special ones
GRIDS = {"a": ((1, 4, 6),), "b": ((1, 8, 4), (1, 4, 4)), "c": (), "d": ((1, 2, 2),), "e": ()}
TOWER_LAYOUTS = {
    "qwen2_5_vl": [dict(tp=2), dict(pp=2)],
    "qwen3_vl": [dict(tp=2, sp=True, recompute="full"), dict(cp=2), dict(distributed_optimizer=True)],
}
LAYOUTS = [
    dict(tp=2),
    dict(tp=2, sp=True),
    dict(cp=2),
    dict(pp=2),
    dict(distributed_optimizer=True),
    dict(pp=2, vpp=2),
]


def reference(family: str):
    """Four layers: with pp = 2 DeepStack adds to layers of either stage."""
    return tiny.FAMILIES[family](tied=False, num_hidden_layers=4)


class Pictures(TextPromptEncoder):
    """Encodes prompts whose image files are only names; GRIDS has their sizes."""

    def __init__(self, arch: Architecture):
        self.arch = arch

    def pictures(self, prompt: Prompt) -> tuple[Picture, ...]:
        found = []
        for number, grid in enumerate(GRIDS[prompt.id]):
            generator = torch.Generator().manual_seed(ord(prompt.id) + number)
            patches = grid[0] * grid[1] * grid[2]
            found.append(Picture(f"{prompt.id}{number}", torch.randn(patches, 96, generator=generator), grid))
        return tuple(found)

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        pictures = self.pictures(prompt)
        ids = expand_image_tokens(prompt.token_ids.tolist(), image_grids(pictures), self.arch)
        return EncodedPrompt(
            np.array(ids), mrope_positions(torch.tensor(ids), image_grids(pictures), self.arch), pictures
        )

    def length(self, prompt: Prompt) -> int:
        return len(self(prompt).prompt_ids)


def make_samples() -> list[Sample]:
    """Three responses of unequal length a prompt."""
    draw = random.Random(0)
    ids = lambda low, high: tuple(draw.randrange(IDS) for _ in range(draw.randint(low, high)))  # noqa: E731
    image = (tiny.VISION_START, tiny.IMAGE_PAD, tiny.VISION_END)
    samples = []
    for name, grids in GRIDS.items():
        tokens = (*ids(1, 3), *(token for _ in grids for token in (*image, *ids(1, 2))), *ids(1, 4))
        prompt = Prompt(name, tokens, "", images=tuple(Path(f"{name}{n}") for n in range(len(grids))))
        samples += [Sample(prompt, ids(1, 9), draw.uniform(-1.5, 1.5), 1.0, 0.0) for _ in range(3)]
    total = sum(len(sample.response_ids) for sample in samples)
    return [replace(sample, pg_weight=1 / total) for sample in samples]


TOWER = ("language_model", "visual")


def open_trainer(
    student: Path, layout, *, train_merger: bool = False, train=None, dtype: torch.dtype = torch.float32, **numbers
) -> Trainer:
    vision, optimizer = (
        VisionConfig(train_merger=train_merger, patches_per_pass=40),
        OPTIMIZER.model_copy(update=numbers),
    )
    return Trainer(student, layout, optimizer, steps=3, dtype=dtype, vocab_size=IDS, vision=vision, train=train)


def nll_and_gradients(trainer: Trainer, max_tokens: int = 60) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step over all samples: -sum of log-probs (on the last stage; at ratio 1 the policy loss itself is the same
    for every model), and gradients whole and by transformers' names."""
    batch = pack(make_samples(), max_tokens=max_tokens, encode=Pictures(trainer.chunks[0].arch))
    assert len(batch.micro_batches) > 1 and sum(bool(micro.tokens.pictures) for micro in batch.micro_batches) > 1
    stats = trainer.accumulate_gradients(batch)
    named = export_weights(trainer.chunks, lambda parameter: parameter.main_grad)
    nll = torch.tensor([float(s.sums_M[SUM_NAMES.index("nll")]) for s in stats]).sum()
    dist.all_reduce(nll, group=trainer.chunks[0].layout.cp_group)
    return float(nll), {name: tensor.clone() for name, tensor in named}


def expected_nll_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    """The same in plain torch on a transformers model, sequence by sequence, on materialised logits."""
    encode = Pictures(Architecture.from_config(model.config))
    loss, nll = torch.zeros(()), 0.0
    for sample in make_samples():
        prompt = encode(sample.prompt)
        ids = torch.tensor([*prompt.prompt_ids.tolist(), *sample.response_ids.tolist()])
        logits = tiny.Row(ids, None, prompt.pictures).logits(model)[len(prompt.prompt_ids) - 1 : -1, :IDS]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids.tolist())[:, None])[:, 0]
        loss = loss - sample.pg_weight * sample.advantage * (logp - logp.detach()).exp().sum()
        nll -= float(logp.double().sum())
    loss.backward()
    named = model.named_parameters(remove_duplicate=False)
    return nll, {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def check(trainer: Trainer, family: str, takes_tower: bool = False) -> None:
    """Log-probs and every trained gradient are transformers'; with mergers trained, or the whole tower."""
    nll, found = nll_and_gradients(trainer)
    expected_nll, expected = expected_nll_and_gradients(reference(family))
    if not takes_tower:
        merged = {name for name in expected if "visual" in name and "merger" in name}
        assert merged
        expected = {name: gradient for name, gradient in expected.items() if "visual" not in name or name in merged}
    assert found.keys() == expected.keys()
    errors = {name: relative({name: found[name]}, {name: expected[name]}) for name in found}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-5, (worst, errors)
    if trainer.chunks[-1].post_process:
        assert abs(nll - expected_nll) <= 1e-5 * expected_nll, (nll, expected_nll)


class TeacherPrompts(Pictures):
    """A teacher's own rendering: one more id in front."""

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        return super().__call__(replace(prompt, token_ids=(3, *prompt.token_ids)))


def check_teacher(trainer: Trainer, student: Path, layout) -> None:
    """The student as its own teacher gives the log-probs that the student has behind the teacher's prompts."""
    other = TeacherPrompts(trainer.chunks[0].arch)
    teacher = Teacher(student, layout, dtype=torch.float32, vocab_size=IDS, encode=other, patches_per_pass=40)
    samples = [replace(sample, kl_weight=float(number % 4 > 0)) for number, sample in enumerate(make_samples())]
    scored = teacher.score(pack(samples, max_tokens=60, encode=Pictures(other.arch)))
    expected = trainer.logprobs(pack(samples, max_tokens=999, encode=other))
    for micro in scored.micro_batches if layout.is_last_stage else ():
        for sequence, place in enumerate(micro.sample_B):
            wanted = torch.tensor(expected[place]) * (samples[place].kl_weight > 0)
            torch.testing.assert_close(micro.logp_teacher_N[micro.sequence_N == sequence], wanted, rtol=0, atol=1e-5)


class Blank(Pictures):
    """The same pictures without any detail. (With a tenth of their contrast, siblings' mean advantages differ by so
    little that their z-scores, and with them the weights, amplify fp32 rounding to 1e-4.)"""

    def pictures(self, prompt: Prompt) -> tuple[Picture, ...]:
        pictures = super().pictures(prompt)
        return tuple(replace(p, key=f"{p.key} blank", pixel_values=torch.zeros_like(p.pixel_values)) for p in pictures)


def visual_weights(trainer: Trainer, student: Path, layout) -> dict[int, list[float]]:
    """Sample place -> VA-OPD's weights of its tokens, from whichever replica has it."""
    encode, degraded = (kind(trainer.chunks[0].arch) for kind in (Pictures, Blank))
    teacher = VisualAdvantageTeacher(
        student, layout, dtype=torch.float32, vocab_size=IDS, encode=encode, degraded=degraded, patches_per_pass=40
    )
    samples = [replace(sample, kl_weight=1.0) for sample in make_samples()]
    batch = teacher.score(pack(samples, max_tokens=30, replicas=trainer.replicas, encode=encode))
    assert teacher.metrics["visual_advantage"] > 0, "told on every stage"
    local = {
        sample: micro.kl_weight_N[micro.sequence_N == sequence].tolist()
        for micro in (batch.micro_batches if layout.is_last_stage else ())
        for sequence, sample in enumerate(micro.sample_B)
    }
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    if layout.dp == 2:
        first, second = ({samples[place].prompt.id for place in found} for found in everyone)
        assert first & second, "siblings on two replicas were tried"
    return {place: weights for found in everyone for place, weights in found.items()}


class NoLog:
    phase = PhaseTimers()


def image_sensitivity(trainer: Trainer, layout) -> dict[str, float]:
    """ImageSensitivity of the samples, with blank pictures as the degraded ones."""
    samples, encoders = make_samples(), [kind(trainer.chunks[0].arch) for kind in (Pictures, Blank)]
    metric = ImageSensitivity([sample.prompt for sample in samples], *encoders, every=1, max_tokens=60)
    return metric.measure(0, samples, trainer, Job(layout, torch.float32, NoLog()))


def rank(students: dict[str, Path], run_dir: Path) -> None:
    """Every family on every layout of two processes, each continuing from the checkpoint of the one before."""
    weights_of: dict[str, dict] = {}
    sensitivity_of: dict[str, dict] = {}
    for step, sizes in enumerate(LAYOUTS):
        layout = initialise(**sizes, seed=0)
        for family, student in students.items():
            trainer = open_trainer(student, layout, train_merger=True)
            sensitivity = image_sensitivity(trainer, layout)
            sensitivity_of.setdefault(family, sensitivity)
            assert (
                sensitivity == approx(sensitivity_of[family], abs=1e-5) and abs(sensitivity["image_sensitivity"]) > 1e-4
            )
            if not sizes.get("distributed_optimizer"):  # whose ranks hold only their share of a gradient
                check(trainer, family)
                check_teacher(trainer, student, layout)
            found = visual_weights(trainer, student, layout)
            expected = weights_of.setdefault(family, found)
            assert all(torch.allclose(torch.tensor(found[p]), torch.tensor(expected[p]), atol=1e-4) for p in expected)
            checkpoints = Checkpoints(run_dir / family, layout, keep=9)
            if step:
                checkpoints.load(trainer, step)
                last = load_file(run_dir / f"{family}-{step}")
                assert all(torch.equal(last[name], tensor) for name, tensor in trainer.weights())
            batch = pack(
                make_samples(), max_tokens=60, replicas=trainer.replicas, encode=Pictures(trainer.chunks[0].arch)
            )
            assert trainer.step(batch).metrics["skipped"] == 0.0
            checkpoints.save(trainer, step + 1)
            weights = {name: tensor.clone() for name, tensor in trainer.weights()}
            if dist.get_rank() == 0:
                save_file(weights, run_dir / f"{family}-{step + 1}")
                print(family, sizes, flush=True)
            dist.barrier()
    shutdown()


def tower_rank(students: dict[str, Path], run_dir: Path) -> None:
    """As `rank`, with the whole tower trained; pp = 2 only without DeepStack, which has a level on the second stage."""
    for family, student in students.items():
        for step, sizes in enumerate(TOWER_LAYOUTS[family]):
            layout = initialise(**sizes, seed=0)
            trainer = open_trainer(student, layout, train=TOWER)
            if not sizes.get("distributed_optimizer"):
                check(trainer, family, takes_tower=True)
            checkpoints = Checkpoints(run_dir / family, layout, keep=9)
            if step:
                checkpoints.load(trainer, step)
                last = load_file(run_dir / f"{family}-{step}")
                assert all(torch.equal(last[name], tensor) for name, tensor in trainer.weights())
            encode = Pictures(trainer.chunks[0].arch)
            batch = pack(make_samples(), max_tokens=60, replicas=trainer.replicas, encode=encode)
            assert trainer.step(batch).metrics["skipped"] == 0.0
            checkpoints.save(trainer, step + 1)
            weights = {name: tensor.clone() for name, tensor in trainer.weights()}
            if dist.get_rank() == 0:
                save_file(weights, run_dir / f"{family}-{step + 1}")
            everyone: list = [None, None]
            sums = {name: float(tensor.double().sum()) for name, tensor in weights.items()}
            dist.all_gather_object(everyone, sums)
            assert everyone[0] == everyone[1], "replicas stay equal"
    shutdown()
