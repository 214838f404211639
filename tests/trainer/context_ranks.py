"""One step of every kind of loss and teacher, and the rank function of test_context_parallel.py that takes it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from support.steps import LONGEST, assign_token_weights, make_groups, make_teacher, make_trainer
from vold.config.schema import (
    ObjectiveConfig,
    OpenaiConfig,
    PromptConfig,
    SelfTeacherConfig,
    TeacherConfig,
    VllmConfig,
)
from vold.data.packing import pack
from vold.data.prompts import show_hint
from vold.models.architecture import Architecture
from vold.models.tokenizer import load_tokenizer
from vold.models.weights import export_weights
from vold.objectives import PRESETS, build_objective, split_minibatches
from vold.objectives.divergences import REFERENCE_DIVERGENCES, build_divergence
from vold.parallel.launch import initialise, shutdown
from vold.teacher import (
    CalibratedTeacher,
    ChosenTeachers,
    Inside,
    NoTeacher,
    Reference,
    SelfTeacher,
    Teacher,
    TeacherChoice,
    TopTeacher,
    VllmDistributions,
    VllmTeacher,
)
from vold.types import Batch, Rollout, Sample, StepReport

REWARDS = [[1.0, 0.0, 0.0], [0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
UPDATE = dict(lr=2e-2, eps=1e-5, clip_grad=1e9)  # far enough that ratios leave their bounds; gradients as they are
NUMBERS = dict(dtype=torch.float32, vocab_size=40)
FORM = SelfTeacherConfig(template="{problem}{demonstration}{feedback}", demonstration=" {demonstration}", feedback="")


@dataclass(frozen=True)
class World:
    """Checkpoints, and addresses of stand-ins: a server of the teacher, engines of one and of one that fails."""

    student: Path
    teacher: Path
    second: Path
    server: str
    engine: str
    failing: str


def batches(parts: Sequence[Sequence[Sample]]) -> list[Batch]:
    return [pack(part, max_tokens=40) for part in parts]


def updates(world: World, layout, *, name: str, teacher: str | None = None, **changes) -> StepReport:
    """Two updates on the same rollouts: the second one's ratios are not 1."""
    objective = replace(PRESETS[name], max_response_tokens=LONGEST, **changes)
    trainer = make_trainer(world.student, layout, objective=objective, **UPDATE)
    parts = batches(split_minibatches(objective.assign_token_weights(make_groups(REWARDS), minibatches=2)))
    if objective.needs_teacher:
        full = objective.divergence is not None
        parts = [make_teacher(world.teacher, layout, full_distributions=full).score(part) for part in parts]
    return trainer, parts


def lagging(world: World, layout, *, divergence: str | None):
    """Rollouts of older weights, whose ratios are truncated, those of the teacher's term too."""
    objective = build_objective(ObjectiveConfig(preset="vold", divergence=divergence), LONGEST)
    draw = random.Random(0)
    samples = [
        replace(sample, logp_rollout=[draw.uniform(-4, -2) for _ in sample.response_ids])
        for sample in objective.assign_token_weights(make_groups(REWARDS))
    ]
    teacher = make_teacher(world.teacher, layout, full_distributions=divergence is not None)
    trainer = make_trainer(world.student, layout, objective=objective, importance_cap=1.5, **UPDATE)
    return trainer, [teacher.score(part) for part in batches([samples])]


def reference(world: World, layout, *, kind: str):
    """Beside a teacher, in the second of two updates."""
    divergence = REFERENCE_DIVERGENCES[kind]
    model = Teacher(world.second, layout, full_distributions=divergence is not None, **NUMBERS)
    model, teacher = Reference(model, divergence), make_teacher(world.teacher, layout)
    objective = build_objective(ObjectiveConfig(preset="vold"), LONGEST)
    samples = [
        replace(sample, reference_weight=0.01 * (1 + number % 3))
        for number, sample in enumerate(objective.assign_token_weights(make_groups(REWARDS), minibatches=2))
    ]
    trainer = make_trainer(world.student, layout, objective=objective, terms=("reference",), **UPDATE)
    return trainer, [teacher.score(model.score(part)) for part in batches(split_minibatches(samples))]


def several(world: World, layout, *, kinds: tuple[str, str], engine: str = "trainer"):
    """Rows of one teacher, of the other and of both; the second may be an engine that fails at a prompt."""
    paths, kinds_of = {"a": world.teacher, "b": world.second}, dict(zip("ab", kinds, strict=True))
    built = {name: build_divergence(kind) for name, kind in kinds_of.items()}
    weights = {"a": 2.0, "b": 0.5}
    teachers = {name: TeacherConfig(path=path, weight=weights[name]) for name, path in paths.items()}
    choice = replace(
        TeacherChoice.from_config(teachers, "who"), by_distribution=frozenset(n for n, d in built.items() if d)
    )
    whose = ["a", "b", ["a", "b"], {"a": 1.0, "b": 3.0}]
    samples = [
        replace(s, prompt=replace(s.prompt, metadata={"who": whose[int(s.prompt.id[1:])]}))
        for s in assign_token_weights("mopd", make_groups(REWARDS))
    ]
    inside = {
        name: Inside(Teacher(path, layout, full_distributions=built[name] is not None, **NUMBERS), built[name])
        for name, path in paths.items()
    }
    if engine != "trainer":
        inside["b"] = Inside(_vllm(world.second, engine, layout), built["b"])
    chosen = ChosenTeachers(choice, layout, inside)
    terms = tuple(f"teacher_{name}" for name in sorted(choice.by_distribution))
    trainer = make_trainer(world.student, layout, terms=terms, **UPDATE)
    return trainer, [chosen.score(part) for part in batches([chosen.drop_unscorable(samples)])]


def _vllm(checkpoint: Path, url: str, layout) -> VllmDistributions:
    settings, rows = VllmConfig(urls=(url,), restart_seconds=0.0, retries=1), Architecture.from_pretrained(checkpoint)
    return VllmDistributions(checkpoint, settings, layout, student_rows=rows.vocab, **NUMBERS)


def engine(world: World, layout, *, failing: bool):
    objective = build_objective(ObjectiveConfig(preset="vold-unmasked", divergence="reverse_kl"), LONGEST)
    teacher = _vllm(world.teacher, world.failing if failing else world.engine, layout)
    trainer = make_trainer(world.student, layout, objective=objective, **UPDATE)
    samples = objective.assign_token_weights(make_groups(REWARDS))
    scored = [teacher.score(part) for part in batches([samples])]
    assert teacher.metrics == {"teacher_failed": 3.0 * failing}
    return trainer, scored


def server(world: World, layout, *, top_k: int | None):
    """Its most probable ids; or its log-probs of the sampled ones, which come with the rollouts."""
    settings = OpenaiConfig(url=world.server, model="teacher")
    keys = {} if top_k is None else {"divergence": "jsd", "top_k": top_k}
    objective = build_objective(ObjectiveConfig(preset="vold-unmasked", **keys), LONGEST)
    samples = objective.assign_token_weights(make_groups(REWARDS))
    trainer = make_trainer(world.student, layout, objective=objective, **UPDATE)
    if top_k is not None:
        teacher = TopTeacher(world.teacher, settings, layout, top_k=top_k)
        return trainer, [teacher.score(part) for part in batches([samples])]
    teacher = VllmTeacher(world.teacher, settings, temperature=1.0)
    asked = [Rollout(s.prompt, s.response_ids, [-1.0] * len(s.response_ids), "stop", "") for s in samples]
    scores = teacher.submit(asked).result()
    teacher.close()
    return trainer, batches([[replace(s, logp_teacher=x) for s, x in zip(samples, scores, strict=True)]])


def self_taught(world: World, layout, *, preset: str):
    objective = build_objective(ObjectiveConfig(preset=preset, top_k=5), LONGEST)
    groups = [
        replace(g, rollouts=tuple(replace(r, text=f"<think>1</think>{n}") for n, r in enumerate(g.rollouts)))
        for g in make_groups(REWARDS)
    ]
    trainer = make_trainer(world.student, layout, objective=objective, **UPDATE)
    condition = partial(show_hint, tokenizer=load_tokenizer(world.student), config=PromptConfig(suffix=""), form=FORM)
    confident = objective.self_distillation.confident
    numbers = dict(max_tokens=60, temperature=1.0, vocab_size=40, confident=confident)
    teacher = SelfTeacher(trainer.average, layout, condition, **numbers)
    return trainer, [teacher.score(part) for part in batches([objective.assign_token_weights(groups)])]


def calibrated(world: World, layout, *, preset: str, beside: bool):
    """A teacher in the trainer, or one whose scores came with the rollouts."""
    objective = replace(PRESETS[preset], max_response_tokens=LONGEST)
    draw = random.Random(1)
    samples = [
        replace(sample, logp_rollout=[draw.uniform(-4, -2) for _ in sample.response_ids])
        for sample in objective.assign_token_weights(make_groups(REWARDS))
    ]
    if beside:
        samples = [replace(s, logp_teacher=[draw.uniform(-4, -2) for _ in s.response_ids]) for s in samples]
    inner = NoTeacher() if beside else make_teacher(world.teacher, layout)
    teacher = CalibratedTeacher(inner, objective, layout)
    trainer = make_trainer(world.student, layout, objective=objective, **UPDATE)
    return trainer, [teacher.score(part.to(layout.device)) for part in batches([samples])]


CASES: dict[str, Callable] = {
    "gspo": partial(updates, name="vold-gspo", entropy_bonus=0.02, kl_clamp=0.05),
    "dcpo": partial(updates, name="dcpo"),
    "cispo": partial(updates, name="cispo"),
    "sapo": partial(updates, name="sapo"),
    "lag": partial(lagging, divergence=None),
    "lag, whole distributions": partial(lagging, divergence="jsd"),
    "reference k3": partial(reference, kind="k3"),
    "reference jsd": partial(reference, kind="jsd"),
    "two teachers": partial(several, kinds=("k2", "reverse_kl")),
    "two teachers, distributions": partial(several, kinds=("forward_kl", "jsd")),
    "two teachers, one failing": lambda world, layout: several(
        world, layout, kinds=("reverse_kl", "reverse_kl"), engine=world.failing
    ),
    "engine": partial(engine, failing=False),
    "engine, failing": partial(engine, failing=True),
    "server, top ids": partial(server, top_k=5),
    "server, sampled ids": partial(server, top_k=None),
    "sdpo": partial(self_taught, preset="sdpo"),
    "srpo": partial(self_taught, preset="srpo"),
    "top-d": partial(calibrated, preset="top-d", beside=False),
    "uni-opd": partial(calibrated, preset="uni-opd", beside=False),
    "uni-opd beside": partial(calibrated, preset="uni-opd", beside=True),
}


FEW = (
    "gspo",
    "lag, whole distributions",
    "reference k3",
    "two teachers, one failing",
    "server, top ids",
    "srpo",
    "uni-opd beside",
)
"""Of each mechanism one; with ALL=1 in the environment all are taken."""


def cases() -> dict[str, Callable]:
    return CASES if os.environ.get("ALL") else {name: CASES[name] for name in FEW}


def measure(world: World, layout, out: Path) -> None:
    """Of each case the gradients of the last update, whole, and what the step reports, alike on all ranks."""
    VllmDistributions._compare = lambda *_: None  # the stand-in is no model
    for name, case in cases().items():
        trainer, scored = case(world, layout)
        report = trainer.step(*scored, logged_sample_ids=range(99))
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, report)
        assert all(other == report for other in everyone), f"{name}: every rank reports the same"
        found = {n: tensor.clone() for n, tensor in export_weights(trainer.chunks, lambda p: p.main_grad)}
        if dist.get_rank() == 0:
            save_file(found, out / f"{name}.safetensors")
            text = {"metrics": report.metrics, "mean_kl": report.mean_kl, "tokens": report.tokens}
            (out / f"{name}.json").write_text(json.dumps(text))


def rank(world: World, sizes: dict, out: Path) -> None:
    measure(world, initialise(**sizes, seed=0), out)
    shutdown()
