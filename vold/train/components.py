"""Assembly of the training stages: checks of the config, and the models, data and engines that a loop uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vold.config.schema import AdapterConfig, RlConfig, SftConfig, TrainConfig
from vold.data.packing import PromptEncoder, pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.evaluation.evaluator import Evaluator
from vold.grading import Grader
from vold.models.adapters import VISUAL
from vold.models.architecture import Architecture, check_expert_sizes
from vold.models.chat_template import load_chat_tokenizer
from vold.models.checkpoint_dir import short_name
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import check_checkpoint, check_pair, stop_ids
from vold.objectives import Objective, build_objective
from vold.objectives.visual_advantage import degrade
from vold.rollout import TransformersSampler, open_sampler
from vold.rollout.vllm.adapters import RANKS
from vold.run.job import Job, open_job
from vold.run.step_profiler import StepProfiler
from vold.teacher import NoReference, TeacherChoice
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
    tokenizer = load_chat_tokenizer(config.student, config.prompt)
    vocab_size = _vocab_size(config.student, config.teacher, served=config.teacher_engine != "trainer")
    for several in config.teachers.values():
        _vocab_size(config.student, several.path, served=several.engine != "trainer")
    options = problem_options(config, objective)
    if reward_function is not GraderReward:  # of a caller in Python, as the challenger's: it may ask for no answers
        options["needs_gold"] = None
    problems = load_problems(config.data, **options)
    encode = load_prompt_encoder(config.student)
    prompts = build_prompts(problems, tokenizer, config.prompt, config.data.on_error, encode.length)
    check_trained_vision(config, prompts)
    check_judge_template(config.reward, prompts)
    sources = TeacherSources.from_config(config, objective, problems)
    teacher_pictures = sources.check(prompts, warn=job.is_writer)
    image_sensitivity = ImageSensitivity(
        prompts,
        encode,
        load_prompt_encoder(config.student, degrade),
        every=config.image_sensitivity_every,
        max_tokens=config.microbatch_tokens,
    )
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    pictures = {image for prompt in chain(prompts, *evaluator.prompts.values()) for image in prompt.images}
    inputs = InputFiles.open(config.run_dir, training_files(config, pictures | teacher_pictures), resume=resume)
    trainer = _rl_trainer(config, job, sources.trained_objective(objective), vocab_size, sources.terms)
    teacher = sources.open_batch_teacher(job, trainer, tokenizer)
    reference = open_reference(config, job, objective, trainer)
    device, adapter = job.layout.device, config.synced_adapter
    options: dict[str, Any] = {"adapter": adapter, "keep_requests": config.rollout.lag > 1}
    sampler = open_sampler(config.rollout, config.student, dtype=job.dtype, device=device, **options)
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
        packer = partial(pack, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=encode)
        with RolloutSchedule(job, prompts, worker, plan) as rollouts:
            yield RlComponents(
                job,
                tokenizer,
                encode,
                objective,
                trainer,
                teacher,
                reference,
                sources.choice,
                rollouts,
                image_sensitivity,
                training,
                packer,
            )


@contextmanager
def open_sft(config: SftConfig, *, resume: bool, profiler: StepProfiler | None) -> Iterator[SftComponents]:
    """The components of a stage-1 run, with the weights to continue from. A sampler is opened only where the run
    evaluates. Raises ValueError as `open_rl` does."""
    check_sft_config(config)
    _check_expert_sizes(config)
    job = open_job(config, "sft", total=config.steps, resume=resume)
    tokenizer, encode = load_chat_tokenizer(config.student, config.prompt), load_prompt_encoder(config.student)
    vocab_size = _vocab_size(config.student, config.pair_with)
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


def _vocab_size(student: Path, teacher: Path | None, *, served: bool = False) -> int:
    """The bound of the ids that a student shares with its teacher, or of its own where it has none (see check_pair)."""
    if teacher is None:
        return check_checkpoint(student)
    return check_pair(student, teacher, served=served).shared_vocab_size


# -- checks that need no model -------------------------------------------------------------------------------------


def check_rl_config(config: RlConfig, objective: Objective) -> None:
    """Raise ValueError for mistakes that are visible before any model is loaded."""
    if objective.needs_teacher and config.teacher is None and not config.teachers:
        raise ValueError(f"objective.preset = {config.objective.preset!r} needs a teacher; set teacher: PATH")
    _check_reference(config, objective)
    if config.teachers and objective.needs_teacher and objective.visual_advantage:
        raise ValueError("objective.visual_advantage is of one teacher; set teacher: PATH instead of teachers")
    views = [config.teacher_view, *(several.view for several in config.teachers.values())]
    if any(view.degraded_column for view in views) and not objective.visual_advantage:
        raise ValueError(
            "a teacher view's degraded_column is the second reading of objective.visual_advantage; leave it out, or "
            "set that"
        )
    teacher_engine = config.teacher_engine if objective.needs_teacher else ""
    engines = [
        ("rollout.vllm", config.rollout.engine, config.rollout.vllm),
        ("teacher_vllm", teacher_engine, config.teacher_vllm),
    ]
    engines += [(f"teachers.{name}.vllm", several.engine, several.vllm) for name, several in config.teachers.items()]
    for key, engine, settings in engines:
        if config.rollout.lag and engine == "vllm" and not settings.urls:
            raise ValueError(
                f"rollout.lag = {config.rollout.lag} needs engines that do not share the trainer's GPU: start them "
                f"with `vold serve` and name them in {key}.urls, or set rollout.lag=0"
            )
    _check_lag(config)
    if objective.visual_advantage and teacher_engine in ("vllm", "openai"):
        raise ValueError(
            "objective.visual_advantage reads each response twice, with degraded images, and teacher_engine = "
            f"{teacher_engine!r} does not; set teacher_engine=trainer"
        )
    if config.synced_adapter is not None:
        _check_synced_adapter(config, config.synced_adapter)
    _check_router_replay(config)
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    if longest > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold prompt.max_tokens + rollout.max_new_tokens "
            f"= {longest}; raise it or lower those"
        )


def _check_router_replay(config: RlConfig) -> None:
    mode, key = config.rollout.router_replay, f"rollout.router_replay = {config.rollout.router_replay}"
    if mode is None:
        return
    arch = Architecture.from_pretrained(config.student)
    if arch.mixture is None:
        raise ValueError(f"{key} is of a mixture of experts and student = {config.student} has none; leave it out")
    if mode == "R2" and config.minibatches == 1:
        raise ValueError(f"{key} replays the choices before a step's first update to the others: set minibatches > 1")
    if mode == "R3" and config.rollout.engine == "vllm":
        raise ValueError(
            f"{key} needs the sampler's choices: vLLM 0.32 returns them from its second model runner alone, in which "
            "log-probs are not those of the policy; set rollout.engine=transformers, or router_replay R2 or null"
        )


def _check_lag(config: RlConfig) -> None:
    """Raise ValueError for what does not go together with sampling over weight syncs."""
    lag, reason = config.rollout.lag, ""
    if lag < 2:
        return
    if config.rollout.dynamic_sampling is not None:
        reason = "does not sample in the place of groups that are dropped: leave rollout.dynamic_sampling out"
    elif config.synced_adapter is not None:
        reason = "needs whole weights, which running requests go on with: set adapter.sync=merged"
    elif config.rollout.engine == "vllm" and trains_tower(config):
        reason = "would use images that engines have read with an older vision tower: train the language model alone"
    if reason:
        raise ValueError(f"rollout.lag = {lag} {reason}, or set rollout.lag=1")


def _check_synced_adapter(config: RlConfig, adapter: AdapterConfig) -> None:
    reason = ""
    if config.rollout.engine != "vllm":
        reason = f"needs rollout.engine=vllm, not {config.rollout.engine}"
    elif adapter.rank > RANKS[-1]:
        reason = f"and adapter.rank = {adapter.rank}: vLLM takes at most {RANKS[-1]}"
    elif visual := [target for target in adapter.targets if target in VISUAL]:
        reason = f"and adapter.targets has {visual[0]}, which vLLM leaves out"
    elif config.train or config.vision.train_merger:
        reason = "leaves out the weights that train or vision.train_merger names"
    elif adapter.base_bits is not None:
        reason = f"and adapter.base_bits = {adapter.base_bits}: the engine's base would have other weights"
    if reason:
        raise ValueError(f"adapter.sync = adapter {reason}; set adapter.sync=merged")


def _check_reference(config: RlConfig, objective: Objective) -> None:
    if config.reference is None:
        return
    if not objective.reference_beta:
        raise ValueError(
            f"reference = {config.reference} is not read with objective.reference_beta = 0; set that, or leave it out"
        )
    _vocab_size(config.student, config.reference)
    sees, reads = (bool(Architecture.from_pretrained(path).vision) for path in (config.reference, config.student))
    if reads and not sees:
        raise ValueError(
            f"reference = {config.reference} reads text only and the student images too; choose a model that the "
            "student started from"
        )


def check_sft_config(config: SftConfig) -> None:
    """Raise ValueError for mistakes that are visible before any model is loaded."""
    if config.adapter is not None and config.adapter.sync != "merged":
        raise ValueError("adapter.sync = adapter is for vLLM in stage 2; sft evaluates merged weights: leave it out")
    if config.max_tokens > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold max_tokens = {config.max_tokens}; raise it"
        )


def trains_tower(config: TrainConfig) -> bool:
    """Whether weights of the vision tower, or of its mergers, are trained."""
    return config.vision.train_merger or any(_visual_weights(config))


def _visual_weights(config: TrainConfig) -> tuple[list[str], list[str]]:
    """(patterns of `train`, targets of the adapter) that name some."""
    named = [p for p in config.train or () if short_name(p).startswith("visual") or short_name(p) == "*"]
    adapted = [target for target in config.adapter.targets if target in VISUAL] if config.adapter else []
    return named, adapted


def check_trained_vision(config: TrainConfig, prompts: Iterable[Prompt]) -> None:
    """Raise ValueError for a vision tower that no image would train: weight decay alone would change it."""
    named, adapted = _visual_weights(config)
    if not trains_tower(config) or any(prompt.images for prompt in prompts):
        return
    if adapted:
        raise ValueError(f"adapter.targets has {adapted[0]}, but no training prompt has an image; leave it out")
    if config.vision.train_merger:
        raise ValueError("vision.train_merger = true, but no training prompt has an image; set it to false")
    raise ValueError(f"train takes {named[0]!r}, but no training prompt has an image; leave it out")


# -- models of stage 2 ---------------------------------------------------------------------------------------------


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
