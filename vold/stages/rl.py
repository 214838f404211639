"""`vold rl`: stage 2. Responses are sampled once and used twice: for a clipped policy gradient on a verifiable reward,
and for k2 distillation towards the teacher where the objective routes it (VOLD Eq. 6). Text only, vision frozen."""

from __future__ import annotations

from collections.abc import Callable

from vold.config.schema import RlConfig
from vold.data.pack import pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.grading import Grader
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.objectives import Objective, build_objective
from vold.rollout import open_sampler
from vold.stages.evaluate import Evaluator
from vold.stages.groups import (
    Judge,
    RolloutWorker,
    StreamedTeacher,
    VerdictJudge,
    group_rows,
    mask_unscored,
    teacher_metrics,
)
from vold.stages.job import Job, open_job
from vold.stages.probe import build_probe
from vold.stages.rollouts import Rollouts
from vold.stages.training import TrainingRun
from vold.teacher import NoTeacher, Teacher
from vold.trainer.engine import Trainer
from vold.trainer.step_profiler import StepProfiler

NOTHING_LEFT = (
    "no group of responses is left",
    "see above for prompts that were lost, and prompts.jsonl for pass rates (rollout.dynamic_sampling drops groups)",
)


def run(
    config: RlConfig,
    *,
    resume: bool = False,
    profiler: StepProfiler | None = None,
    open_judge: Callable[[Job, Grader], Judge] = VerdictJudge,
) -> None:
    """Train, evaluate and save as the config says; ends with run_dir/model. With a profiler nothing is saved.
    `open_judge`: who says what responses are worth, where it is not the grader alone."""
    objective = build_objective(config.objective)
    _check(config, objective)
    job = open_job(config, "rl", total=config.steps, resume=resume)
    tokenizer = load_tokenizer(config.student)
    vocab_size = check_pair(config.student, config.teacher).shared_vocab_size if config.teacher else len(tokenizer)
    prompts = build_prompts(load_problems(config.data), tokenizer, config.prompt, config.data.on_error)
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt)
    trainer = _trainer(config, job, objective, vocab_size)
    teacher = _teacher(config, job, objective, vocab_size)
    sampler = open_sampler(config.rollout, config.student, dtype=job.dtype, device=job.layout.device)
    probe = build_probe(prompts[0], evaluator, sampler, parity_limit=config.parity_limit)
    training = TrainingRun.open(config, job, trainer, evaluator, profiler)
    if resume:
        training.resume()
    training.hand_over(sampler, probe)

    with (
        Grader(workers=config.grader_workers) as grader,
        Rollouts(
            config,
            job,
            prompts,
            RolloutWorker(
                sampler, open_judge(job, grader), objective, config.rollout, _streamed_teacher(config, objective)
            ),
            done=training.done,
        ) as rollouts,
    ):
        for step in training.steps():
            drawn = rollouts.next(step)
            weighed = objective.weigh(drawn.groups)
            samples = mask_unscored(weighed)
            batch = pack(samples, max_tokens=config.microbatch_tokens, replicas=trainer.replicas)
            with job.log.phase("teacher"):
                batch = teacher.score(batch)
            with job.log.phase("train"):
                report = trainer.step(batch) if samples else trainer.skip(*NOTHING_LEFT)
            rollouts.settle()
            with job.log.phase("sync"):
                parity = training.hand_over(sampler, probe)
            metrics = drawn.metrics | teacher_metrics(weighed) | report.metrics | parity
            shown = group_rows(drawn.groups, samples, report.mean_kl, config.samples_per_step)
            training.finish_step(step, metrics, shown, sampler, grader)
    training.export()


def _check(config: RlConfig, objective: Objective) -> None:
    """Mistakes that can be seen before any model is loaded."""
    if objective.needs_teacher and config.teacher is None:
        raise ValueError(f"objective.preset = {config.objective.preset!r} needs a teacher; set teacher: PATH")
    rollout = config.rollout
    if rollout.lag and rollout.engine == "vllm" and not rollout.vllm.urls:
        raise ValueError(
            f"rollout.lag = {rollout.lag} needs engines on GPUs of their own, and this one shares the trainer's: start "
            "them with `vold serve` and name them in rollout.vllm.urls, or set rollout.lag=0"
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
        clip=(objective.clip_low, objective.clip_high),
        temperature=config.rollout.temperature,
        importance_cap=config.rollout.importance_cap if config.rollout.lag else None,
    )


def _teacher(config: RlConfig, job: Job, objective: Objective, vocab_size: int) -> Teacher | NoTeacher:
    if not objective.needs_teacher or config.teacher_engine == "vllm":
        return NoTeacher()
    return Teacher(
        config.teacher,
        job.layout,
        dtype=job.dtype,
        vocab_size=vocab_size,
        temperature=config.rollout.temperature,
        offload=config.teacher_offload,
    )


def _streamed_teacher(config: RlConfig, objective: Objective) -> StreamedTeacher | None:
    """The teacher that is asked for each group as it is done, where it has engines of its own."""
    if not objective.needs_teacher or config.teacher_engine == "trainer":
        return None
    from vold.teacher.vllm import VllmTeacher

    return VllmTeacher(config.teacher, config.teacher_vllm, temperature=config.rollout.temperature)
