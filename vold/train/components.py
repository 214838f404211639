"""Assembly of the training stages: the models, data and engines that a loop uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vold.config.schema import RlConfig, SftConfig, TrainConfig
from vold.data.packing import PromptEncoder, pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.evaluation.evaluator import Evaluator
from vold.grading import Grader
from vold.models.architecture import Architecture, check_expert_sizes
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import stop_ids
from vold.objectives import Objective, build_objective
from vold.objectives.visual_advantage import degrade
from vold.rollout import TransformersSampler, open_sampler
from vold.run.job import Job, open_job
from vold.run.step_profiler import StepProfiler
from vold.teacher import NoReference, TeacherChoice
from vold.train.config_checks import check_rl_config, check_sft_config, check_trained_vision, shared_vocab_size
from vold.train.image_sensitivity import ImageSensitivity
from vold.train.input_files import InputFiles, training_files
from vold.train.probe import build_probe
from vold.train.reward_function import GraderReward, RewardFunction
from vold.train.reward_terms import (
    check_judge_template,
    check_reward_terms,
    open_reward_terms,
    problem_options,
    record_reward_files,
)
from vold.train.rollout_schedule import RolloutSchedule, StepPlan
from vold.train.rollout_worker import RolloutWorker
from vold.train.teachers import BatchTeacher, TeacherSources, open_reference
from vold.train.training_run import TrainingRun, evaluates_after
from vold.trainer.trainer import Trainer
from vold.types import Batch, Prompt, Sample

Packer = Callable[[Sequence[Sample]], Batch]
"""Packs the samples of one update into this rank's micro-batches."""


@dataclass(frozen=True)
class RlComponents:
    """Everything that the loop of `train_rl` uses."""

    job: Job
    tokenizer: PreTrainedTokenizerBase
    encode: PromptEncoder
    objective: Objective
    trainer: Trainer
    teacher: BatchTeacher
    reference: NoReference
    choice: TeacherChoice | None
    rollouts: RolloutSchedule
    image_sensitivity: ImageSensitivity
    training: TrainingRun
    pack: Packer


@dataclass(frozen=True)
class SftComponents:
    """Everything that the loop of `train_sft` uses."""

    job: Job
    samples: Sequence[Sample]
    trainer: Trainer
    training: TrainingRun
    pack: Packer


@contextmanager
def open_rl(
    config: RlConfig,
    *,
    resume: bool,
    profiler: StepProfiler | None,
    reward_function: Callable[[Job, Grader], RewardFunction],
) -> Iterator[RlComponents]:
    """The components of a stage-2 run, with the weights to continue from. Raises ValueError for a config that cannot
    work, before any model is loaded where that is possible."""
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    check_rl_config(config, objective)
    in_trainer = objective.needs_teacher and config.teacher_engine == "trainer"
    _check_expert_sizes(config, config.teacher if in_trainer else None, config.reference)
    reward_files = check_reward_terms(config, objective)
    job = open_job(config, "rl", total=config.steps, resume=resume)
    record_reward_files(job, config.run_dir, reward_files, resume=resume)
    # a function of a caller in Python, as the challenger's, may ask for no answers
    data = _read_rl_data(config, objective, job, needs_gold=reward_function is GraderReward)
    prompts, sources, evaluator = data.prompts, data.sources, data.evaluator
    inputs = InputFiles.open(config.run_dir, training_files(config, data.pictures), resume=resume)
    trainer = _rl_trainer(config, job, sources.trained_objective(objective), data.vocab_size, sources.terms)
    teacher = sources.open_batch_teacher(job, trainer, data.tokenizer)
    reference = open_reference(config, job, objective, trainer)
    sampler = open_sampler(
        config.rollout,
        config.student,
        dtype=job.dtype,
        device=job.layout.device,
        adapter=config.synced_adapter,
        keep_requests=config.rollout.lag > 1,
    )
    probe = build_probe(prompts[0], evaluator, sampler, parity_limit=config.parity_limit)
    reward_terms = open_reward_terms(config, objective, job.world_size)
    with Grader(workers=config.grader_workers, echo=config.grader_echo) as grader, reward_terms as terms:
        training = TrainingRun(config, job, trainer, evaluator, grader, sampler, probe, inputs, profiler)
        if resume:
            training.resume()
        training.sync_weights()
        remote_teacher = sources.open_remote_teacher(job)
        rewards = reward_function(job, grader)
        busy = job.log.phase.beside("teacher") if remote_teacher else None
        worker = RolloutWorker(
            sampler, rewards, objective, config.rollout, config.reward, remote_teacher, terms, busy=busy
        )
        plan = StepPlan(
            config.steps,
            config.prompts_per_step,
            config.seed,
            config.data.shuffle,
            completed=training.completed_steps,
            restored=training.restored.get("prompts"),
        )
        packer = partial(pack, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=data.encode)
        with RolloutSchedule(job, prompts, worker, plan) as rollouts:
            yield RlComponents(
                job,
                data.tokenizer,
                data.encode,
                objective,
                trainer,
                teacher,
                reference,
                sources.choice,
                rollouts,
                data.image_sensitivity,
                training,
                packer,
            )


@dataclass(frozen=True)
class _RlData:
    """What `open_rl` reads before it loads a model. pictures: files that the run reads again and again."""

    tokenizer: PreTrainedTokenizerBase
    encode: PromptEncoder
    vocab_size: int
    prompts: Sequence[Prompt]
    sources: TeacherSources
    image_sensitivity: ImageSensitivity
    evaluator: Evaluator
    pictures: set[Path]


def _read_rl_data(config: RlConfig, objective: Objective, job: Job, *, needs_gold: bool) -> _RlData:
    tokenizer, encode = load_chat_tokenizer(config.student, config.prompt), load_prompt_encoder(config.student)
    vocab_size = shared_vocab_size(config.student, config.teacher, served=config.teacher_engine != "trainer")
    for several in config.teachers.values():
        shared_vocab_size(config.student, several.path, served=several.engine != "trainer")
    options = problem_options(config, objective)
    if not needs_gold:
        options["needs_gold"] = None
    problems = load_problems(config.data, **options)
    prompts = build_prompts(problems, tokenizer, config.prompt, config.data.on_error, encode.length)
    check_trained_vision(config, prompts)
    check_judge_template(config.reward, prompts)
    sources = TeacherSources.from_config(config, objective, problems)
    pictures = sources.check(prompts, warn=job.is_writer)
    sensitivity = ImageSensitivity(
        prompts,
        encode,
        load_prompt_encoder(config.student, degrade),
        every=config.image_sensitivity_every,
        max_tokens=config.microbatch_tokens,
    )
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    pictures |= {image for prompt in chain(prompts, *evaluator.prompts.values()) for image in prompt.images}
    return _RlData(tokenizer, encode, vocab_size, prompts, sources, sensitivity, evaluator, pictures)


@contextmanager
def open_sft(config: SftConfig, *, resume: bool, profiler: StepProfiler | None) -> Iterator[SftComponents]:
    """The components of a stage-1 run, with the weights to continue from. A sampler is opened only where the run
    evaluates. Raises ValueError as `open_rl` does."""
    check_sft_config(config)
    _check_expert_sizes(config)
    job = open_job(config, "sft", total=config.steps, resume=resume)
    tokenizer, encode = load_chat_tokenizer(config.student, config.prompt), load_prompt_encoder(config.student)
    vocab_size = shared_vocab_size(config.student, config.pair_with)
    ends = stop_ids(config.student, tokenizer)
    limits: dict[str, Any] = {"max_tokens": config.max_tokens, "stop_ids": ends, "length": encode.length}
    samples = load_samples(config.data, tokenizer, config.prompt, **limits)
    check_trained_vision(config, (sample.prompt for sample in samples))
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    pictures = {
        *samples.pictures(),
        *(image for prompt in chain(*evaluator.prompts.values()) for image in prompt.images),
    }
    inputs = InputFiles.open(config.run_dir, training_files(config, pictures), resume=resume)
    trainer = Trainer(
        config.student,
        job.layout,
        config.optimizer,
        steps=config.steps,
        dtype=job.dtype,
        vocab_size=vocab_size,
        vision=config.vision,
        adapter=config.adapter,
        train=config.train,
    )
    sampler = probe = None
    if evaluates_after(config.steps - 1, config.steps, config.evaluation):
        sampler = TransformersSampler(config.student, dtype=job.dtype, device=job.layout.device)
        probe = build_probe(samples[0].prompt, evaluator, sampler, parity_limit=config.parity_limit)
    with Grader() as grader:
        training = TrainingRun(config, job, trainer, evaluator, grader, sampler, probe, inputs, profiler)
        if resume:
            training.resume()
        packer = partial(pack, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=encode)
        yield SftComponents(job, samples, trainer, training, packer)


def _check_expert_sizes(config: TrainConfig, *frozen: Path | None) -> None:
    """frozen: the trainer's other models."""
    models = (Architecture.from_pretrained(path) for path in (config.student, *frozen) if path is not None)
    check_expert_sizes(config.parallel.ep, config.parallel.etp, *models)


def _rl_trainer(config: RlConfig, job: Job, objective: Objective, vocab_size: int, terms: Sequence[str]) -> Trainer:
    return Trainer(
        config.student,
        job.layout,
        config.optimizer,
        steps=config.steps,
        dtype=job.dtype,
        vocab_size=vocab_size,
        objective=objective,
        temperature=config.rollout.temperature,
        importance_cap=config.rollout.importance_cap if config.rollout.lag or config.minibatches > 1 else None,
        vision=config.vision,
        adapter=config.adapter,
        train=config.train,
        terms=terms,
        router_replay=config.rollout.router_replay,
    )
