"""What both training stages share: opening a run, resuming it, saving, evaluating, and the finished model."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vold.config.schema import TrainConfig, VisionConfig
from vold.evaluation.evaluator import Evaluator
from vold.evaluation.scores import summarise
from vold.grading import Grader
from vold.models.checkpoint_dir import export_checkpoint
from vold.parallel.collectives import any_rank, run_on_all_ranks
from vold.rollout import ParityProbe, Sampler
from vold.run.job import Job
from vold.run.step_profiler import StepProfiler
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.trainer import Trainer
from vold.types import Prompt


def check_vision(config: VisionConfig, prompts: Iterable[Prompt]) -> None:
    """Raises ValueError for mergers that no image would teach: weight decay alone would move them."""
    if config.train_merger and not any(prompt.images for prompt in prompts):
        raise ValueError("vision.train_merger = true, but no training prompt has an image; set it to false")


@dataclass
class TrainingRun:
    """A stage's trainer with the run directory around it."""

    config: TrainConfig
    job: Job
    trainer: Trainer
    evaluator: Evaluator
    checkpoints: Checkpoints
    done: int = 0  # completed steps
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last of them; seconds are this rank's own
    best: float = -math.inf  # accuracy on evaluation.best of the checkpoint that `best` points at
    asked_to_stop: bool = False
    profiler: StepProfiler | None = None  # then nothing is saved or exported

    @classmethod
    def open(
        cls, config: TrainConfig, job: Job, trainer: Trainer, evaluator: Evaluator, profiler: StepProfiler | None
    ) -> TrainingRun:
        checkpoints = Checkpoints(config.run_dir, job.layout, config.keep_checkpoints, asynchronous=config.save_async)
        trainer.phases = job.log.phase
        return cls(config, job, trainer, evaluator, checkpoints, profiler=profiler)

    def resume(self) -> None:
        """Continue after the latest checkpoint; from the start when none was saved yet."""
        step = run_on_all_ranks(self.checkpoints.latest_step)[
            0
        ]  # a shared file system may show ranks different pointers
        if step is not None:
            self.checkpoints.load(self.trainer, step)
            self.done = step
        self.last = self.job.from_writer(self.job.log.rewind(self.done))
        self._find_best()

    def _find_best(self) -> None:
        """Go on from the best step on record whose checkpoint is still there; of equals the earlier."""
        if self.config.evaluation.best is None:
            return
        key, saved = f"accuracy_{self.config.evaluation.best}", self.checkpoints.saved()
        rows = [row for row in self.job.log.metrics() if key in row and row["step"] in saved]
        row = self.job.from_writer(max(rows, key=lambda row: row[key], default={key: -math.inf, "step": None}))
        self.best = row[key]
        self.checkpoints.set_best(row["step"])

    def steps(self) -> Iterator[int]:
        """0-based steps still to do. SIGTERM lets the step under way finish (see finish_step); a second one kills."""

        def ask_to_stop(*_signal) -> None:
            self.asked_to_stop = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, ask_to_stop)
        try:
            yield from range(self.done, self.config.steps)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due once 0-based `step` is done."""
        done, settings = step + 1, self.config.evaluation
        return bool(settings.every and settings.sets) and (done % settings.every == 0 or done == self.config.steps)

    def sync_weights(self, sampler: Sampler, probe: ParityProbe) -> dict[str, float]:
        """The trained weights to the sampler, and the proof that they arrived."""
        sampler.load_weights(self.trainer.weights())
        return probe.check(sampler, self.trainer.logprobs)

    def finish_step(self, step: int, metrics: dict, rows: list[dict], sampler: Sampler | None, grader: Grader) -> None:
        """Evaluate and save where due, then write the step: what is on disk is what has happened. When a rank was sent
        SIGTERM, all save and end with exit code 143."""
        done, total, best = step + 1, self.config.steps, False
        if self.evaluates_after(step):
            with self.job.log.phase("evaluate"):
                answers = self.evaluator.run(sampler, grader, self.job, self.config.seed)
            for name, found in answers.items():
                summary = summarise(found)
                metrics |= {f"accuracy_{name}": summary["accuracy"], f"stderr_{name}": summary["stderr"]}
            best = self._is_best(metrics)
        row = self.last = self.job.log.write(done, metrics, rows)
        stop = any_rank(self.asked_to_stop, self.job.layout.device)
        if self.profiler:
            self.profiler.step(row, self.job.log.phase.intervals)
        elif done == total or stop or best or (self.config.save_every and done % self.config.save_every == 0):
            self.checkpoints.save(self.trainer, done, best=best)
        else:
            self.checkpoints.poll()
        if done == total or stop:
            self.checkpoints.wait()
        if stop:
            self.job.log.close()
            raise SystemExit(128 + signal.SIGTERM)

    def _is_best(self, metrics: dict) -> bool:
        """Whether this evaluation beats those before it on evaluation.best; the same on every rank."""
        accuracy = metrics.get(f"accuracy_{self.config.evaluation.best}", -math.inf)
        better, self.best = accuracy > self.best, max(accuracy, self.best)
        return better

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
