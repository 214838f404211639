"""The run around a training loop: resuming, weight syncs, evaluations, checkpoints, and the finished model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from vold.config.schema import EvaluationConfig, TrainConfig
from vold.evaluation.evaluator import Evaluator
from vold.evaluation.scores import summarise
from vold.grading import Grader
from vold.models.chat_template import write_chat_template
from vold.models.checkpoint_dir import export_checkpoint
from vold.parallel.collectives import largest_of_ranks, run_on_all_ranks
from vold.rollout import ParityProbe, Sampler
from vold.run.job import Job
from vold.run.step_profiler import StepProfiler
from vold.run.stop import StopRequest
from vold.train.input_files import InputFiles
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.trainer import Trainer


@dataclass
class TrainingRun:
    """A stage's trainer with its run directory, evaluator and sampler.

    sampler, probe   None where the stage never evaluates
    inputs           what the run was begun with
    profiler         where there is one, nothing is saved or exported
    completed_steps  counts those before a resumption
    last_metrics     the row of the last completed step; its seconds are this rank's own
    best_accuracy    accuracy on evaluation.best of the checkpoint that `best` points at, which has `best_step`
    restored         what the loaded checkpoint says about the next steps (see `_steering`); empty where it says nothing
    """

    config: TrainConfig
    job: Job
    trainer: Trainer
    evaluator: Evaluator
    grader: Grader
    sampler: Sampler | None
    probe: ParityProbe | None
    inputs: InputFiles
    profiler: StepProfiler | None = None
    completed_steps: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    best_accuracy: float = -math.inf
    best_step: int | None = None
    restored: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stop = StopRequest(self.config.stop_grace_seconds)
        self.checkpoints = Checkpoints(
            self.config.run_dir, self.job.layout, self.config.keep_checkpoints, asynchronous=self.config.save_async
        )
        self.trainer.phases = self.job.log.phase

    def resume(self) -> None:
        """Load the latest checkpoint; start from the beginning when none was saved yet."""
        steps = run_on_all_ranks(self.checkpoints.latest_step)
        step = steps[0]  # on a shared file system ranks may read different pointers
        if step is not None:
            self.checkpoints.load(self.trainer, step)
            self.completed_steps = step
            self.restored = self.job.broadcast(self.checkpoints.steering(step)) or {}
        run_on_all_ranks(lambda: self.job.log.check_rows(step or 0, self.restored.get("logs")))
        logged = self.job.broadcast(self.job.log.drop_rows_after(self.completed_steps))
        self.last_metrics = self.restored.get("last_metrics", logged)
        self._check_steered_from()
        self._find_best()
        if self.completed_steps > self.config.steps:
            raise ValueError(f"--resume: {self.completed_steps} steps are done; steps = {self.config.steps} is fewer")
        if self.completed_steps:
            self.job.log.say(f"resumed after step {self.completed_steps}")
        run_on_all_ranks(self._keep_earlier_model)

    def _keep_earlier_model(self) -> None:
        """A run that is lengthened has a finished model already, of fewer steps: it keeps it under another name."""
        model = self.config.run_dir / "model"
        if self.job.is_writer and self.completed_steps < self.config.steps and model.exists():
            earlier = model.with_name(f"model-step-{self.completed_steps}")
            model.rename(earlier)
            self.job.log.say(f"the finished model of step {self.completed_steps} is now {earlier}")

    def _say_start(self) -> None:
        """What is trained, with what, how far."""
        config, layout = self.config, self.job.layout
        teacher = getattr(config, "teacher", None)
        rollout = getattr(config, "rollout", None)
        sampled_by = rollout and f"rollouts by {rollout.engine}"
        names = ("tp", "pp", "cp", "dp") if layout.cp > 1 else ("tp", "pp", "dp")
        sizes = " × ".join(f"{name} {getattr(layout, name)}" for name in names)
        first = self.completed_steps + 1
        steps = f"steps {first} to {config.steps}" if first <= config.steps else f"all {config.steps} steps are done"
        facts = [steps, f"student {config.student}", teacher and f"teacher {teacher}"]
        self.job.log.say(f"{config.run_dir}: " + " · ".join(filter(None, [*facts, sampled_by, sizes, config.dtype])))

    def _check_steered_from(self) -> None:
        """Raise ValueError where beta is steered by a step whose metrics are lost."""
        objective, found = getattr(self.config, "objective", None), self.last_metrics.get("step", 0)
        if objective is not None and objective.target_kl is not None and found != self.completed_steps:
            raise ValueError(
                f"--resume: metrics.jsonl ends at step {found} and the checkpoint at {self.completed_steps}, from "
                "whose beta objective.target_kl continues; restore the file, or start another run_dir"
            )

    def _find_best(self) -> None:
        """Continue from the best step so far whose checkpoint is still there; of equals the earlier."""
        if self.config.evaluation.best is None:
            return
        key, saved = f"accuracy_{self.config.evaluation.best}", self.checkpoints.saved()
        best = self.restored.get("best", {"step": None})
        if best["step"] not in saved:
            rows = [row for row in self.job.log.read_metrics() if key in row and row["step"] in saved]
            row = max(rows, key=lambda row: row[key], default={key: -math.inf, "step": None})
            best = {"accuracy": row[key], "step": row["step"]}
        best = self.job.broadcast(best)
        self.best_accuracy, self.best_step = best["accuracy"], best["step"]
        self.checkpoints.set_best(best["step"])

    def _steering(self, prompts: dict) -> dict:
        """What decides about the next steps beside the weights, kept in each checkpoint. The logs are on disk before
        it is. prompts: the state of RolloutSchedule; logs: see RunLog.flush."""
        best = {"accuracy": self.best_accuracy if self.best_step else None, "step": self.best_step}
        last = {key: value for key, value in self.last_metrics.items() if _is_finite(value)}
        self.inputs.record()
        logs = run_on_all_ranks(self.job.log.flush)[0]
        return {"last_metrics": last, "best": best, "prompts": prompts or None, "logs": logs}

    def steps(self) -> Iterator[int]:
        """0-based steps still to do. A signal that asks to stop lets the step under way finish (see finish_step)."""
        self._say_start()
        with self._stop:
            yield from range(self.completed_steps, self.config.steps)

    def evaluates_after(self, step: int) -> bool:
        """True where an evaluation is due once 0-based `step` is done."""
        return evaluates_after(step, self.config.steps, self.config.evaluation)

    def sync_weights(self) -> dict[str, float]:
        """Send the trained weights to the sampler, and check that they arrived (see ParityProbe)."""
        assert self.sampler is not None and self.probe is not None
        adapter = getattr(self.config, "synced_adapter", None)
        self.sampler.load_weights(self.trainer.adapters() if adapter else self.trainer.weights())
        return self.probe.check(self.sampler, self.trainer.logprobs)

    def finish_step(self, step: int, metrics: dict, rows: list[dict], prompts: dict | None = None) -> None:
        """Evaluate where due, log 0-based `step` with its sample rows, and save where due, with the state of the
        prompts where there is one.

        Where a rank was asked to stop, all ranks save and exit with 128 plus the signal's number: 143 after SIGTERM.
        """
        done, total, best = step + 1, self.config.steps, False
        if self.evaluates_after(step):
            metrics |= self._evaluate()
            best = self._is_best(metrics, done)
        row = self.last_metrics = self.job.log.log_step(done, metrics, rows)
        stop = largest_of_ranks(self._stop.signal, self.job.layout.device)
        if stop:
            self._stop.save_begins(stop)
        if self.profiler:
            self.profiler.step(row, self.job.log.phase.intervals)
        elif done == total or stop or best or (self.config.save_every and done % self.config.save_every == 0):
            self.checkpoints.save(self.trainer, done, best=best, steering=self._steering(prompts or {}))
            self.job.log.say(f"saved after step {done}" + (" (the best so far)" if best else ""), logging.DEBUG)
        else:
            self.checkpoints.poll()
        if done == total or stop:
            self.checkpoints.wait()
        if stop:
            self.job.log.say(f"stopped and saved after step {done} of {total}; the same command with --resume goes on")
            self.job.log.close()
            raise SystemExit(128 + stop)

    def _evaluate(self) -> dict[str, float]:
        assert self.sampler is not None
        metrics = {}
        with self.job.log.phase("evaluate"):
            rows = self.evaluator.run(self.sampler, self.grader, self.job, self.config.seed)
        for name, answers in rows.items():
            summary = summarise(answers)
            metrics |= {f"accuracy_{name}": summary["accuracy"], f"stderr_{name}": summary["stderr"]}
        return metrics

    def _is_best(self, metrics: dict, done: int) -> bool:
        """True where this evaluation exceeds those before it on evaluation.best; the same on every rank."""
        accuracy = metrics.get(f"accuracy_{self.config.evaluation.best}", -math.inf)
        if better := accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, done
        return better

    def export(self) -> None:
        """Write the trained model as an ordinary checkpoint directory, run_dir/model, and close the log."""
        if self.profiler:
            return self.job.log.close()
        target = self.config.run_dir / "model"
        if not self.job.broadcast(target.exists()):
            weights = self.trainer.weights()
            if self.job.is_writer:
                amend = partial(write_chat_template, prompt=self.config.prompt)
                export_checkpoint(self.config.student, target, weights, amend=amend)
            else:
                for _ in weights:  # a collective: this rank sends its shards
                    pass
        self.job.log.say(f"finished: {target}; to look at it: vold report {self.config.run_dir}")
        self.job.log.close()


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def evaluates_after(step: int, steps: int, config: EvaluationConfig) -> bool:
    """True where an evaluation is due once 0-based `step` of `steps` is done."""
    done = step + 1
    return bool(config.every and config.sets) and (done % config.every == 0 or done == steps)
