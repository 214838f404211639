"""`vold rl`: stage 2. Responses are sampled once and used twice: for a clipped policy gradient on a verifiable reward,
and for k2 distillation towards the teacher where the objective routes it (VOLD Eq. 6). Text only, vision frozen."""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from vold.config.schema import RlConfig
from vold.data.order import rows_of_step
from vold.data.pack import pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts, show_demonstration
from vold.grading import Grader
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.objectives import Objective, build_objective, minibatches
from vold.rollout import open_sampler
from vold.stages.evaluate import Evaluator
from vold.stages.groups import grade_groups, group_metrics, group_rows, rollout_calls, teacher_saving
from vold.stages.job import Job, open_job
from vold.stages.probe import build_probe
from vold.stages.training import TrainingRun
from vold.teacher import NoTeacher, SelfTeacher, Teacher
from vold.trainer.engine import Trainer
from vold.trainer.step_profiler import StepProfiler


def run(config: RlConfig, *, resume: bool = False, profiler: StepProfiler | None = None) -> None:
    """Train, evaluate and save as the config says; ends with run_dir/model. With a profiler nothing is saved."""
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    _check(config, objective)
    job = open_job(config, "rl", total=config.steps, resume=resume)
    tokenizer = load_tokenizer(config.student)
    vocab_size = check_pair(config.student, config.teacher).shared_vocab_size if config.teacher else len(tokenizer)
    prompts = build_prompts(load_problems(config.data), tokenizer, config.prompt, config.data.on_error)
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt)
    trainer = _trainer(config, job, objective, vocab_size)
    teacher = _teacher(config, job, objective, trainer, tokenizer)
    sampler = open_sampler(config.rollout, config.student, dtype=job.dtype, device=job.layout.device)
    probe = build_probe(prompts[0], evaluator, sampler, parity_limit=config.parity_limit)
    training = TrainingRun.open(config, job, trainer, evaluator, profiler)
    if resume:
        training.resume()
    training.hand_over(sampler, probe)

    responses = config.rollout.responses_per_prompt
    with Grader(workers=config.grader_workers) as grader:
        for step in training.steps():
            rows = rows_of_step(step, rows=len(prompts), per_step=config.prompts_per_step, seed=config.seed)
            calls = job.share(rollout_calls([prompts[row] for row in rows], config.rollout, job.world))
            with job.log.phase("rollout"):
                rollouts = [
                    sampler.sample(
                        asked, config.rollout, responses=responses, seed=_sampling_seed(config.seed, step, number)
                    )
                    for number, asked in calls
                ]
            with job.log.phase("grade"):
                graded = [grade_groups(found, grader, responses) for found in rollouts]
            with job.log.phase("gather"):
                groups = [group for call in job.gather(graded) for group in call]
            current = objective.at(step, training.last)
            samples = current.weigh(groups, minibatches=config.minibatches)
            batches = [
                pack(part, max_tokens=config.microbatch_tokens, replicas=trainer.replicas)
                for part in minibatches(samples)
            ]
            with job.log.phase("teacher"):
                batches = [teacher.score(batch) for batch in batches]
            with job.log.phase("train"):
                report = trainer.step(*batches)
            with job.log.phase("sync"):
                parity = training.hand_over(sampler, probe)
            metrics = group_metrics(groups) | teacher_saving(samples) | current.metrics() | report.metrics | parity
            shown = group_rows(groups, samples, report.mean_kl, config.samples_per_step)
            training.finish_step(step, metrics, shown, sampler, grader)
    training.export()


def _check(config: RlConfig, objective: Objective) -> None:
    """Mistakes that can be seen before any model is loaded."""
    if objective.needs_teacher and config.teacher is None:
        raise ValueError(f"objective.preset = {config.objective.preset!r} needs a teacher; set teacher: PATH")
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
    )


def _teacher(
    config: RlConfig, job: Job, objective: Objective, trainer: Trainer, tokenizer: PreTrainedTokenizerBase
) -> Teacher | SelfTeacher | NoTeacher:
    head = {"temperature": config.rollout.temperature, "vocab_size": trainer.vocab_size}
    if objective.teaches_itself:
        shown = {"tokenizer": tokenizer, "config": config.prompt, "template": config.self_teacher_template}
        return SelfTeacher(
            trainer.average,
            job.layout,
            partial(show_demonstration, **shown),
            max_tokens=config.microbatch_tokens,
            confident=objective.self_teaching.confident,
            **head,
        )
    if not objective.needs_teacher:
        return NoTeacher()
    return Teacher(
        config.teacher,
        job.layout,
        **head,
        dtype=job.dtype,
        offload=config.teacher_offload,
        whole=objective.divergence is not None,
    )


def _sampling_seed(seed: int, step: int, call: int) -> int:
    """A pure function of where we are, so that a resumed run draws what the uninterrupted one would have."""
    return int(np.random.SeedSequence([seed, step, call]).generate_state(1)[0])
