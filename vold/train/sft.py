"""`vold sft`: stage 1, maximum likelihood on traces (VOLD Eq. 4; there of text, vision frozen)."""

from __future__ import annotations

from vold.config.schema import SftConfig
from vold.data.order import rows_of_step
from vold.data.packing import pack
from vold.data.traces import load_samples
from vold.evaluation.evaluator import Evaluator
from vold.grading import Grader
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.objectives import assign_sft_weights
from vold.rollout import TransformersSampler
from vold.run.job import open_job
from vold.run.step_profiler import StepProfiler
from vold.train.probe import build_probe
from vold.train.training_run import TrainingRun, check_vision
from vold.trainer.trainer import Trainer


def run(config: SftConfig, *, resume: bool = False, profiler: StepProfiler | None = None) -> None:
    """Train, evaluate and save as the config says; ends with run_dir/model. With a profiler nothing is saved."""
    check_config(config)
    job = open_job(config, "sft", total=config.steps, resume=resume)
    tokenizer = load_tokenizer(config.student)
    if config.pair_with is not None:
        check_pair(config.student, config.pair_with)
    encode = load_prompt_encoder(config.student)
    samples = load_samples(config.data, tokenizer, config.prompt, max_tokens=config.max_tokens)
    check_vision(config.vision, (sample.prompt for sample in samples))
    trainer = Trainer(
        config.student,
        job.layout,
        config.optimizer,
        steps=config.steps,
        dtype=job.dtype,
        vocab_size=len(tokenizer),
        vision=config.vision,
    )
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    training = TrainingRun.open(config, job, trainer, evaluator, profiler)
    sampler = probe = None
    if training.evaluates_after(config.steps - 1):
        sampler = TransformersSampler(config.student, dtype=job.dtype, device=job.layout.device)
        probe = build_probe(samples[0].prompt, evaluator, sampler, parity_limit=config.parity_limit)
    if resume:
        training.resume()

    order_seed = config.seed if config.data.shuffle else None
    with Grader() as grader:
        for step in training.steps():
            rows = rows_of_step(step, rows=len(samples), per_step=config.batch_size, seed=order_seed)
            weighed = assign_sft_weights([samples[row] for row in rows])
            batch = pack(weighed, max_tokens=config.microbatch_tokens, replicas=trainer.replicas, encode=encode)
            with job.log.phase("train"):
                report = trainer.step(batch)
            metrics = {**report.metrics, "loss": report.metrics["nll"]}
            if training.evaluates_after(step):
                metrics |= training.sync_weights(sampler, probe)
            metrics["response_tokens"] = report.metrics["gradient_tokens"]
            training.finish_step(step, metrics, [], sampler, grader)
    training.export()


def check_config(config: SftConfig) -> None:
    """Mistakes that can be seen before any model is loaded."""
    if config.max_tokens > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold max_tokens = {config.max_tokens}; raise it"
        )
