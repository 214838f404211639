"""`vold sft`: stage 1 of VOLD, maximum likelihood on the teacher's traces (Eq. 4). In the paper traces are text and the
vision tower is frozen."""

from __future__ import annotations

from vold.config.schema import SftConfig
from vold.data.order import rows_of_step
from vold.objectives import assign_sft_weights
from vold.run.step_profiler import StepProfiler
from vold.train.components import open_sft


def train_sft(config: SftConfig, *, resume: bool = False, profiler: StepProfiler | None = None) -> None:
    """Train, evaluate and save as the config says; writes the finished model to run_dir/model.

    resume: continue the run in run_dir after its latest checkpoint. profiler: record the steps and save nothing.
    Raises ValueError for a config that cannot work, and where run_dir holds another run.
    """
    order_seed = config.seed if config.data.shuffle else None
    with open_sft(config, resume=resume, profiler=profiler) as run:
        for step in run.training.steps():
            rows = rows_of_step(step, rows=len(run.samples), per_step=config.batch_size, seed=order_seed)
            weighted = assign_sft_weights([run.samples[row] for row in rows])
            batch = run.pack(weighted)
            with run.job.log.phase("train"):
                report = run.trainer.step(batch)
            metrics = report.metrics | {"loss": report.metrics["nll"]}
            if run.training.evaluates_after(step):
                metrics |= run.training.sync_weights()
            metrics["response_tokens"] = report.metrics["gradient_tokens"]
            run.training.finish_step(step, metrics, [])
    run.training.export()
