"""`vold rl`: stage 2. Responses are sampled once and used twice: for a clipped policy gradient on a verifiable reward,
and for k2 distillation towards the teacher where the objective routes it (VOLD Eq. 6). Text and images; of the vision
tower nothing is trained but, where the config says so, its mergers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from vold.config.schema import RlConfig
from vold.data.packing import pack
from vold.data.problems import Problem, load_problems
from vold.data.prompts import build_prompts, show_hint
from vold.evaluation.evaluator import Evaluator
from vold.grading import Grader
from vold.models.architecture import Architecture
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.objectives import Objective, build_objective, split_minibatches
from vold.objectives.visual_advantage import degrade
from vold.rollout import open_sampler
from vold.run.job import Job, open_job
from vold.run.step_profiler import StepProfiler
from vold.teacher import NoTeacher, SelfTeacher, Teacher, TeacherPromptEncoder, VisualAdvantageTeacher, VllmTeacher
from vold.train.groups import (
    RemoteTeacher,
    RewardFunction,
    RolloutWorker,
    VerdictReward,
    group_rows,
    logged_sample_ids,
    mask_unscored,
    teacher_metrics,
    teacher_skipped_images,
)
from vold.train.image_sensitivity import ImageSensitivity
from vold.train.probe import build_probe
from vold.train.rollout_schedule import Rollouts
from vold.train.training_run import TrainingRun, check_vision
from vold.trainer.trainer import Trainer

NOTHING_LEFT = (
    "no group of responses is left",
    "see above for prompts that were lost, and prompts.jsonl for pass rates (rollout.dynamic_sampling drops groups)",
)


def run(
    config: RlConfig,
    *,
    resume: bool = False,
    profiler: StepProfiler | None = None,
    open_reward: Callable[[Job, Grader], RewardFunction] = VerdictReward,
) -> None:
    """Train, evaluate and save as the config says; ends with run_dir/model. With a profiler nothing is saved.
    `open_reward`: who says what responses are worth, where it is not the grader alone."""
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    check_config(config, objective)
    job = open_job(config, "rl", total=config.steps, resume=resume)
    tokenizer = load_tokenizer(config.student)
    vocab_size = check_pair(config.student, config.teacher).shared_vocab_size if config.teacher else len(tokenizer)
    problems, encode = load_problems(config.data), load_prompt_encoder(config.student)
    prompts = build_prompts(problems, tokenizer, config.prompt, config.data.on_error, encode.length)
    check_vision(config.vision, prompts)
    reliance = ImageSensitivity(
        prompts,
        encode,
        load_prompt_encoder(config.student, degrade),
        every=config.image_sensitivity_every,
        max_tokens=config.microbatch_tokens,
    )
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    trainer = _trainer(config, job, objective, vocab_size)
    teacher = _teacher(config, job, objective, trainer, tokenizer, problems)
    sampler = open_sampler(config.rollout, config.student, dtype=job.dtype, device=job.layout.device)
    probe = build_probe(prompts[0], evaluator, sampler, parity_limit=config.parity_limit)
    training = TrainingRun.open(config, job, trainer, evaluator, profiler)
    if resume:
        training.resume()
    training.sync_weights(sampler, probe)

    with (
        Grader(workers=config.grader_workers) as grader,
        Rollouts(
            config,
            job,
            prompts,
            RolloutWorker(
                sampler,
                open_reward(job, grader),
                objective,
                config.rollout,
                config.reward,
                _streamed_teacher(config, job, objective),
            ),
            done=training.done,
        ) as rollouts,
    ):
        for step in training.steps():
            drawn = rollouts.next(step)
            current = objective.at_step(step, training.last)
            weighed = current.assign_token_weights(drawn.groups, minibatches=config.minibatches)
            scorable = teacher.drop_unscorable(weighed)
            samples = mask_unscored(scorable)
            batches = [
                pack(part, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=encode)
                for part in split_minibatches(samples)
            ]
            with job.log.phase("teacher"):
                batches = [teacher.score(batch) for batch in batches]
            seen = reliance.measure(step, weighed, trainer, job)
            shown = logged_sample_ids(drawn.groups, config.samples_per_step)
            with job.log.phase("train"):
                report = trainer.step(*batches, logged_sample_ids=shown) if samples else trainer.skip(*NOTHING_LEFT)
            rollouts.wait_for_rollouts()
            with job.log.phase("sync"):
                parity = training.sync_weights(sampler, probe)
            metrics = (
                drawn.metrics | teacher_metrics(scorable, encode.length) | teacher_skipped_images(weighed, scorable)
            )
            metrics |= teacher.metrics | current.metrics() | report.metrics | parity | seen
            rows = group_rows(drawn.groups, samples, report, shown, tokenizer)
            training.finish_step(step, metrics, rows, sampler, grader)
    training.export()


def check_config(config: RlConfig, objective: Objective) -> None:
    """Mistakes that can be seen before any model is loaded."""
    if objective.needs_teacher and config.teacher is None:
        raise ValueError(f"objective.preset = {config.objective.preset!r} needs a teacher; set teacher: PATH")
    drawn_by = ("rollout.vllm", config.rollout.engine, config.rollout.vllm)
    scored_by = ("teacher_vllm", config.teacher_engine if objective.needs_teacher else "", config.teacher_vllm)
    for key, engine, settings in (drawn_by, scored_by):
        if config.rollout.lag and engine == "vllm" and not settings.urls:
            raise ValueError(
                f"rollout.lag = {config.rollout.lag} needs engines that do not share the trainer's GPU: start them "
                f"with `vold serve` and name them in {key}.urls, or set rollout.lag=0"
            )
    if objective.divergence is not None and scored_by[1] == "vllm":
        raise ValueError(
            "objective.divergence is of whole distributions and teacher_engine = 'vllm' gives log-probs of the sampled "
            "tokens; set teacher_engine=trainer, or objective.divergence=k2"
        )
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    if longest > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold prompt.max_tokens + rollout.max_new_tokens "
            f"= {longest}; raise it or lower those"
        )


def _trainer(config: RlConfig, job: Job, objective: Objective, vocab_size: int) -> Trainer:
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
    )


def _teacher(
    config: RlConfig,
    job: Job,
    objective: Objective,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
) -> Teacher | SelfTeacher | NoTeacher:
    head = {"temperature": config.rollout.temperature, "vocab_size": trainer.vocab_size}
    if objective.uses_self_teacher:
        shown = {"tokenizer": tokenizer, "config": config.prompt, "form": config.self_teacher}
        return SelfTeacher(
            trainer.average,
            job.layout,
            partial(show_hint, **shown),
            max_tokens=config.microbatch_tokens,
            confident=objective.self_distillation.confident,
            **head,
        )
    if not objective.needs_teacher or config.teacher_engine == "vllm":
        return NoTeacher()
    settings = head | dict(
        dtype=job.dtype,
        patches_per_pass=config.vision.patches_per_pass,
        offload=config.teacher_offload,
        full_distributions=objective.divergence is not None,
    )
    if not Architecture.from_pretrained(config.teacher).vision:
        _check_blind_teacher(config, job, objective, problems)
        return Teacher(config.teacher, job.layout, **settings)
    settings["encode"] = TeacherPromptEncoder(config.teacher, problems, config.prompt)
    if not objective.visual_advantage:
        return Teacher(config.teacher, job.layout, **settings)
    degraded = TeacherPromptEncoder(config.teacher, problems, config.prompt, degrade)
    return VisualAdvantageTeacher(config.teacher, job.layout, degraded=degraded, **settings)


def _check_blind_teacher(config: RlConfig, job: Job, objective: Objective, problems: Sequence[Problem]) -> None:
    """Refuses where a text-only teacher has nothing to say; tells where it has less to say."""
    line = f"teacher = {config.teacher} reads text only"
    if objective.visual_advantage:
        raise ValueError(f"{line}; objective.visual_advantage needs one that sees")
    seen = sum(bool(problem.images) for problem in problems)
    line = f"{line} and {seen} of {len(problems)} problems have images"
    if seen == len(problems):
        raise ValueError(f"{line}; choose a teacher that sees, or objective.preset=grpo")
    if seen and job.is_writer:
        print(f"{line}: their responses get no KL term (metric teacher_skipped_images)")


def _streamed_teacher(config: RlConfig, job: Job, objective: Objective) -> RemoteTeacher | None:
    """The teacher that is asked for each group as it is done, where it has engines of its own."""
    if not objective.needs_teacher or config.teacher_engine == "trainer":
        return None
    return VllmTeacher(config.teacher, config.teacher_vllm, temperature=config.rollout.temperature, dtype=job.dtype)
