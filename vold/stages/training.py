"""What both training stages share: opening a run, resuming it, saving, evaluating, and the finished model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vold.config.schema import TrainConfig
from vold.grading import Grader
from vold.models.checkpoint_dir import export_checkpoint
from vold.rollout import ParityProbe, Sampler
from vold.stages.evaluate import Evaluator, summarise
from vold.stages.job import Job
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.engine import Trainer
from vold.trainer.step_profiler import StepProfiler


@dataclass
class TrainingRun:
    """A stage's trainer with the run directory around it."""

    config: TrainConfig
    job: Job
    trainer: Trainer
    evaluator: Evaluator
    checkpoints: Checkpoints
    done: int = 0  # completed steps
    profiler: StepProfiler | None = None  # then nothing is saved or exported

    def __post_init__(self) -> None:
        self.trainer.phases = self.job.log.phase

    def resume(self) -> None:
        """Continue after the latest checkpoint; from the start when none was saved yet."""
        step = self.checkpoints.latest_step()
        if step is not None:
            self.checkpoints.load(self.trainer, step)
            self.done = step
        self.job.log.rewind(self.done)

    def steps(self) -> Iterator[int]:
        """0-based steps still to do."""
        yield from range(self.done, self.config.steps)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due once 0-based `step` is done."""
        done, settings = step + 1, self.config.evaluation
        return bool(settings.every and settings.sets) and (done % settings.every == 0 or done == self.config.steps)

    def hand_over(self, sampler: Sampler, probe: ParityProbe) -> dict[str, float]:
        """The trained weights to the sampler, and the proof that they arrived."""
        sampler.load_weights(self.trainer.weights())
        return probe.check(sampler, self.trainer.logprobs)

    def finish_step(self, step: int, metrics: dict, rows: list[dict], sampler: Sampler | None, grader: Grader) -> None:
        """Evaluate and save where due, then write the step: what is on disk is what has happened."""
        done, total = step + 1, self.config.steps
        if self.evaluates_after(step):
            with self.job.log.phase("evaluate"):
                answers = self.evaluator.run(sampler, grader, self.job, self.config.seed)
            metrics |= {f"accuracy_{name}": summarise(found)["accuracy"] for name, found in answers.items()}
        row = self.job.log.write(done, metrics, rows)
        if self.profiler:
            self.profiler.step(row)
        elif done == total or (self.config.save_every and done % self.config.save_every == 0):
            self.checkpoints.save(self.trainer, done)

    def export(self) -> None:
        """The trained model as an ordinary checkpoint directory: run_dir/model."""
        if self.profiler:
            return self.job.log.close()
        target = self.config.run_dir / "model"
        if not self.job.from_writer(target.exists()):
            weights = self.trainer.weights()
            if self.job.is_writer:
                export_checkpoint(self.config.student, target, weights)
            else:
                for _ in weights:  # the shares this rank holds
                    pass
        self.job.log.close()
