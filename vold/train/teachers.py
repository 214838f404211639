"""Opens the teachers of stage 2 as the config and its objective need them, and a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vold.config.schema import OpenaiConfig, RlConfig, TeacherConfig, TeacherViewConfig, VllmConfig
from vold.data.problems import Problem
from vold.data.prompts import show_hint
from vold.io import log
from vold.models.architecture import Architecture
from vold.models.chat_template import own_rendering, pair_prompt
from vold.models.images import load_prompt_encoder
from vold.models.served import ServedModel
from vold.objectives import Objective
from vold.objectives.divergences import VocabularyDivergence, build_divergence
from vold.objectives.visual_advantage import degrade
from vold.run.job import Job
from vold.teacher import (
    AskedTeacher,
    BaseTeacher,
    CalibratedTeacher,
    ChosenTeachers,
    Inside,
    NoReference,
    NoTeacher,
    Reference,
    SelfTeacher,
    SeveralTeachers,
    Teacher,
    TeacherChoice,
    TeacherPromptEncoder,
    TeacherView,
    TextTeacherBeside,
    TopTeacher,
    VisualAdvantageTeacher,
    VllmDistributions,
    VllmTeacher,
)
from vold.train.rollout_worker import RemoteTeacher
from vold.trainer.trainer import Trainer
from vold.types import Prompt

BatchTeacher = Teacher | SelfTeacher | AskedTeacher | ChosenTeachers | CalibratedTeacher | NoTeacher


@dataclass(frozen=True)
class TeacherSource:
    """One teacher of the config. key: its own, `teacher` or `teachers.NAME`. divergence: None for k2. sees: whether it
    reads images. view: what it reads; None: what the student reads."""

    key: str
    settings: TeacherConfig
    divergence: VocabularyDivergence | None
    sees: bool
    view: TeacherView | None

    @property
    def scores_groups(self) -> bool:
        """It scores each group while others are sampled, not the step's batch."""
        return self.settings.engine != "trainer" and self.divergence is None

    @property
    def engine(self) -> VllmConfig | OpenaiConfig:
        """Settings of an engine outside the trainer."""
        return self.settings.openai or self.settings.vllm

    def reads(self, prompt: Prompt) -> bool:
        """Whether it can read what it would be asked."""
        return self.view.reads(prompt) if self.view else self.sees or not prompt.images


@dataclass(frozen=True)
class TeacherSources:
    """The teachers of a run by name (`teacher` alone where there is one), before any is loaded. choice: of several."""

    config: RlConfig
    objective: Objective
    sources: Mapping[str, TeacherSource]
    choice: TeacherChoice | None

    @classmethod
    def from_config(cls, config: RlConfig, objective: Objective, problems: Sequence[Problem]) -> TeacherSources:
        """Raises ValueError for a teacher that cannot do what is asked of it."""
        if not objective.needs_teacher:
            return cls(config, objective, {}, None)
        if not config.teachers:
            assert config.teacher is not None, "see check_rl_config"
            one = TeacherConfig.model_construct(
                path=config.teacher,
                engine=config.teacher_engine,
                divergence=None,
                top_k=None,
                vllm=config.teacher_vllm,
                openai=config.teacher_openai,
                offload=config.teacher_offload,
                view=config.teacher_view,
            )
            return cls(config, objective, {"teacher": _source("teacher", one, config, objective, problems)}, None)
        sources = {
            name: _source(f"teachers.{name}", settings, config, objective, problems)
            for name, settings in config.teachers.items()
        }
        choice = replace(
            TeacherChoice.from_config(config.teachers, config.teacher_column),
            reads={name: source.reads for name, source in sources.items()},
            by_distribution=frozenset(name for name, source in sources.items() if source.divergence),
        )
        return cls(config, objective, sources, choice)

    def check(self, prompts: Sequence[Prompt], *, warn: bool = False) -> set[Path]:
        """The images that teachers read. Raises ValueError for a column without use, and a teacher without rows; logs
        where it has some, with `warn`."""
        if self.choice is not None:
            self.choice.check(prompts)
        elif (source := self.sources.get("teacher")) and not source.sees:
            self._check_text_teacher(source, prompts, warn=warn)
        return {image for source in self.sources.values() if source.view for image in source.view.check()}

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss's further KL terms."""
        several = () if self.choice is None else sorted(self.choice.by_distribution)
        return (*(f"teacher_{name}" for name in several), *(("reference",) if self.objective.reference_beta else ()))

    def trained_objective(self, objective: Objective) -> Objective:
        """The objective as the trainer has it: of several teachers each has its own divergence."""
        return objective if self.choice is None else replace(objective, divergence=None)

    def open_batch_teacher(self, job: Job, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> BatchTeacher:
        """The teacher that scores a step's batches."""
        objective = self.objective
        if objective.uses_self_teacher:
            return self._self_teacher(job, trainer, tokenizer)
        if self.choice is not None:
            inside = {
                name: Inside(self._open(source, job, trainer), source.divergence)
                for name, source in self.sources.items()
                if not source.scores_groups
            }
            teacher: Any = ChosenTeachers(self.choice, job.layout, inside)
        elif not self.sources:
            return NoTeacher()
        else:
            source = self.sources["teacher"]
            if source.scores_groups:
                teacher = NoTeacher() if source.sees else TextTeacherBeside(source.reads)
            else:
                teacher = self._open(source, job, trainer)
        return CalibratedTeacher(teacher, objective, job.layout) if objective.calibrates else teacher

    def open_remote_teacher(self, job: Job) -> RemoteTeacher | None:
        """The teachers in vLLM that score each group as soon as it is graded; None where there is none."""
        opened = {name: self._open_vllm(source, job) for name, source in self.sources.items() if source.scores_groups}
        if self.choice is None:
            return opened.get("teacher")
        return SeveralTeachers(self.choice, opened) if opened else None

    def _open_vllm(self, source: TeacherSource, job: Job) -> VllmTeacher:
        settings: dict[str, Any] = {"temperature": self.config.rollout.temperature, "dtype": job.dtype}
        if source.view is not None:
            settings["view"] = source.view
        return VllmTeacher(source.settings.path, source.engine, **settings)

    def _open(self, source: TeacherSource, job: Job, trainer: Trainer) -> Teacher | AskedTeacher:
        """A teacher that scores batches."""
        config, path = self.config, source.settings.path
        if source.settings.openai is not None:
            assert source.divergence is not None and source.divergence.top_k is not None, "see _source"
            seen = {} if source.view is None else {"view": source.view}
            return TopTeacher(path, source.settings.openai, job.layout, top_k=source.divergence.top_k, **seen)
        head: dict[str, Any] = {"temperature": config.rollout.temperature, "vocab_size": trainer.vocab_size}
        head["dtype"] = job.dtype
        if source.settings.engine == "vllm":
            head["student_rows"] = Architecture.from_pretrained(config.student).vocab
            if source.view is not None:
                head["view"] = source.view
            return VllmDistributions(path, source.settings.vllm, job.layout, **head)
        settings = head | {
            "patches_per_pass": config.vision.patches_per_pass,
            "offload": source.settings.offload,
            "full_distributions": source.divergence is not None,
        }
        if source.view is not None:
            settings |= {"encode": TeacherPromptEncoder(path, source.view), "reads": source.reads}
        if self.objective.visual_advantage:
            assert source.view is not None, "of a teacher that sees"
            from_column = source.settings.view.degraded_column is not None
            degraded = TeacherPromptEncoder(path, source.view, None if from_column else degrade, degraded=from_column)
            absolute = self.objective.visual_advantage == "absolute"
            return VisualAdvantageTeacher(path, job.layout, degraded=degraded, absolute=absolute, **settings)
        open_teacher = partial(BaseTeacher, trainer) if config.is_base(path) else Teacher
        return open_teacher(path, job.layout, **settings)

    def _self_teacher(self, job: Job, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> SelfTeacher:
        config, objective = self.config, self.objective
        assert trainer.average is not None and objective.self_distillation is not None
        return SelfTeacher(
            trainer.average,
            job.layout,
            partial(show_hint, tokenizer=tokenizer, config=config.prompt, form=config.self_teacher),
            max_tokens=config.microbatch_tokens,
            confident=objective.self_distillation.confident,
            temperature=config.rollout.temperature,
            vocab_size=trainer.vocab_size,
        )

    def _check_text_teacher(self, source: TeacherSource, prompts: Sequence[Prompt], *, warn: bool) -> None:
        """Raise ValueError where a text-only teacher could score no response; log where it can score only some."""
        line = f"teacher = {source.settings.path} reads text only"
        if self.objective.visual_advantage:
            raise ValueError(f"{line}; objective.visual_advantage needs a vision-language teacher")
        unread = sum(not source.reads(prompt) for prompt in prompts)
        line = f"{line} and {unread} of {len(prompts)} problems have images"
        if unread == len(prompts):
            raise ValueError(f"{line}; choose a vision-language teacher, or objective.preset=grpo")
        if unread and warn:
            log.info(f"{line}: their responses get no KL term (metric teacher_skipped_images)")


def _source(
    key: str, settings: TeacherConfig, config: RlConfig, objective: Objective, problems: Sequence[Problem]
) -> TeacherSource:
    divergence = objective.divergence if settings.divergence is None else build_divergence(settings.divergence)
    if settings.top_k is not None:
        if divergence is None:
            raise ValueError(f"{key}.top_k is of a whole distribution; set {key}.divergence to one, or leave it out")
        divergence = replace(divergence, top_k=settings.top_k)
    path, served = settings.path, settings.engine != "trainer"
    sees = ServedModel.from_pretrained(path).sees if served else bool(Architecture.from_pretrained(path).vision)
    if settings.engine == "openai":
        sees = False  # token ids are all that it is sent
        if divergence is not None and divergence.top_k is None:
            raise ValueError(
                f"{key}: a server gives its most probable ids, no whole distribution; set top_k beside the divergence "
                "(vllm serve --max-logprobs allows 20), or divergence k2"
            )
        if config.rollout.temperature != 1.0:
            raise ValueError(
                f"{key}: a server's log-probs are those of temperature 1 and rollout.temperature = "
                f"{config.rollout.temperature:g}; set it to 1, or take another engine"
            )
    view = None
    if settings.view != TeacherViewConfig() or (sees and not served):
        own = settings.view.own_template
        prompt = own_rendering(config.prompt) if own else pair_prompt(config.prompt, config.student)
        name = "teacher_view" if key == "teacher" else f"{key}.view"
        options: dict[str, Any] = {"view": settings.view, "data": config.data, "sees": sees, "key": name}
        view = TeacherView(path, problems, prompt, **options)
    return TeacherSource(key, settings, divergence, sees, view)


def open_reference(config: RlConfig, job: Job, objective: Objective, trainer: Trainer) -> NoReference:
    """The frozen reference, where the objective has one."""
    if not objective.reference_beta:
        return NoReference()
    checkpoint = config.reference or config.student
    open_model = partial(BaseTeacher, trainer) if config.is_base(checkpoint) else Teacher
    sees = Architecture.from_pretrained(checkpoint).vision is not None
    model = open_model(
        checkpoint,
        job.layout,
        dtype=job.dtype,
        vocab_size=trainer.vocab_size,
        temperature=config.rollout.temperature,
        encode=load_prompt_encoder(config.student) if sees else None,
        patches_per_pass=config.vision.patches_per_pass,
        offload=config.teacher_offload,
        full_distributions=objective.reference_divergence is not None,
    )
    return Reference(model, objective.reference_divergence)
