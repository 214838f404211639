"""`vold rl`: stage 2 of VOLD. Responses are sampled once and used twice: for a clipped policy gradient on a verifiable
reward, and for k2 distillation towards the teacher where the objective routes it (VOLD Eq. 6).

A step: sample a group of responses to each prompt and grade them; assign each token its policy-gradient and KL weight;
score the tokens with the teacher; update the student; sync its weights to the sampler. Prompts are text or images;
the vision tower stays frozen, except for its mergers with `vision.train_merger`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vold.config.schema import RewardConfig, RlConfig
from vold.config.schema.reward import function_specs
from vold.grading import Grader
from vold.objectives import split_minibatches
from vold.run.job import Job
from vold.run.step_profiler import StepProfiler
from vold.teacher import metrics_by_teacher
from vold.train.components import open_rl
from vold.train.reward_function import GraderReward, RewardFunction
from vold.train.sample_rows import logged_sample_ids, sample_rows
from vold.train.teacher_coverage import image_metrics, mask_unscored, teacher_metrics

NO_GROUPS = (
    "no group of responses is left",
    "see above for prompts that were lost and rewards that failed, and prompts.jsonl for pass rates "
    "(rollout.dynamic_sampling drops groups)",
)


def train_rl(
    config: RlConfig,
    *,
    resume: bool = False,
    profiler: StepProfiler | None = None,
    reward_function: Callable[[Job, Grader], RewardFunction] = GraderReward,
    reward: Any = None,
) -> None:
    """Train, evaluate and save as the config says; writes the finished model to run_dir/model.

    resume: continue the run in run_dir after its latest checkpoint. profiler: record the steps and save nothing.
    reward_function: makes the source of verdicts and of a whole step's rewards, by default the grader.
    reward: `reward.function` of the config: a function at the top level of a file, "PATH.py:NAME", or several with
        their weights.
    Raises ValueError for a config that cannot work, and where run_dir holds another run.
    """
    if reward is not None:
        settings = config.reward.model_dump(exclude_unset=True) | {"function": function_specs(reward)}
        config = config.model_copy(update={"reward": RewardConfig(**settings)})
    with open_rl(config, resume=resume, profiler=profiler, reward_function=reward_function) as run:
        phase = run.job.log.phase
        for step in run.training.steps():
            sampled = run.rollouts.next(step)
            objective = run.objective.at_step(step, run.training.last_metrics)
            weighted = objective.assign_token_weights(sampled.groups, minibatches=config.minibatches)
            scorable = run.teacher.drop_unscorable(weighted)
            samples = mask_unscored(scorable)
            batches = [run.pack(minibatch) for minibatch in split_minibatches(samples)]
            with phase("teacher"):
                batches = [run.teacher.score(run.reference.score(batch)) for batch in batches]
            sensitivity = run.image_sensitivity.measure(step, weighted, run.trainer, run.job)
            logged = logged_sample_ids(sampled.groups, config.samples_per_step)
            with phase("train"):
                report = (
                    run.trainer.step(*batches, logged_sample_ids=logged) if samples else run.trainer.skip(*NO_GROUPS)
                )
            run.rollouts.wait_for_rollouts()
            with phase("sync"):
                parity = run.training.sync_weights()
            metrics = sampled.metrics | teacher_metrics(scorable, run.encode.length) | image_metrics(weighted, scorable)
            metrics |= {**run.teacher.metrics, **objective.metrics(), **report.metrics, **parity, **sensitivity}
            if run.choice is not None:
                metrics |= metrics_by_teacher(run.choice, samples, report.mean_kl)
            rows = sample_rows(sampled.groups, samples, report, logged, run.tokenizer)
            run.training.finish_step(step, metrics, rows, run.rollouts.state)
    run.training.export()
