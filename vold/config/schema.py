"""Every key a YAML may hold, its type, its default, its unit. The only place with defaults.

Functions receive the sub-config they use, never the root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Url = Annotated[str, Field(pattern=r"^https?://[^/]+$")]


class Strict(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ParallelConfig(Strict):
    """How one model copy is divided, student and teacher alike; the rest of the world is data parallel."""

    tp: Positive = 1  # ranks that share each layer
    pp: Positive = 1  # consecutive stages of layers
    vpp: Annotated[int, Field(ge=2)] | None = None  # interleaved stages a rank holds
    sp: bool = False  # norms and residuals divided over the tp ranks too
    distributed_optimizer: bool = False  # fp32 masters and Adam's moments divided over the data-parallel ranks
    recompute: Literal["none", "selective", "full"] = "none"  # what backward computes again: nothing, MLPs, layers


class DataConfig(Strict):
    """A file of problems or traces. `layout` names the public data set whose schema it follows (see vold.data)."""

    path: Path
    layout: Literal["orz", "orz-eval", "gsm8k", "geometry3k", "messages", "prompt-response", "traces"]
    image_root: Path | None = None  # images must lie below; the file's own folder when absent
    on_error: Literal["stop", "skip"] = "stop"
    limit: Positive | None = None  # first rows only


class PromptConfig(Strict):
    """How a problem becomes a chat: [system] user(problem + suffix), rendered by the tokenizer's own template."""

    system: str | None = None
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    max_tokens: Positive = 2048


class SamplingConfig(Strict):
    """temperature 0 is greedy; top_k 0 is off."""

    max_new_tokens: Positive
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    sequences_per_call: Positive = 256  # how many responses are generated side by side


class VllmConfig(Strict):
    """vLLM's own settings, where `engine: vllm`: an engine inside each process, or those that `vold serve` started."""

    urls: tuple[Url, ...] = ()  # http://host:port of each engine; empty: inside the process
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 8.0  # an engine's memory for keys and values
    max_model_len: Positive | None = None  # prompt, image and response tokens; the model's own limit when absent
    enforce_eager: bool = False  # no CUDA graphs: less memory, slower decoding
    weights_dir: Path = Path("/dev/shm")  # where new weights lie until every engine of `urls` has read them
    timeout: Annotated[float, Field(gt=0.0)] = 1800.0  # seconds an engine of `urls` may take for one request
    retries: NonNegative = 2  # how often a request that failed is sent to another engine
    restart_seconds: Annotated[float, Field(ge=0.0)] = 120.0  # how long to wait for one when none of `urls` answers


class EngineConfig(Strict):
    """Which engine samples."""

    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = VllmConfig()


class RolloutConfig(SamplingConfig, EngineConfig):
    """Stage 2's sampler: G responses a prompt."""

    responses_per_prompt: Annotated[int, Field(ge=1)] = 5

    @model_validator(mode="after")
    def _rollouts_are_sampled(self):
        if self.temperature == 0.0:
            raise ValueError("rollout.temperature = 0 gives identical responses; use a value > 0")
        return self


class ObjectiveConfig(Strict):
    """A preset of vold.objectives and its numbers. beta: the paper's table 4 says 1e-3, its text 0.1."""

    preset: str = "vold"
    beta: Annotated[float, Field(ge=0.0)] = 1e-3
    clip_low: Share = 0.2
    clip_high: Annotated[float, Field(ge=0.0)] = 0.3


class OptimizerConfig(Strict):
    """AdamW, linear warm-up, then `schedule` down to lr * min_lr_ratio."""

    lr: Annotated[float, Field(gt=0.0)]
    warmup_steps: NonNegative = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Share = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    clip_grad: Annotated[float, Field(gt=0.0)] = 1.0
    max_bad_steps: Positive = 3  # non-finite steps in a row (each skipped on every rank) before the run stops


class EvaluationConfig(Strict):
    """Named problem sets, answered greedily unless said otherwise."""

    sets: dict[str, DataConfig] = {}
    every: NonNegative = 0  # steps; 0: never during training
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=2048, temperature=0.0)


class RunConfig(Strict):
    """What every verb that writes a run directory has."""

    run_dir: Path
    seed: NonNegative = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    parallel: ParallelConfig = ParallelConfig()
    timeout_seconds: Positive = 1800  # a rank that makes the others wait longer ends the job, and is named
    prompt: PromptConfig = PromptConfig()
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl


class TrainConfig(RunConfig):
    """Common to both stages."""

    student: Path
    data: DataConfig
    optimizer: OptimizerConfig
    steps: Positive
    microbatch_tokens: Positive = 16384  # packed tokens of one forward/backward pass
    save_every: NonNegative = 0  # steps; the last step is always saved
    save_async: bool = False  # train on while a checkpoint is written; its state is held in host memory meanwhile
    keep_checkpoints: Positive = 2
    parity_limit: Annotated[float, Field(gt=1.0)] = 1.05  # mean exp|logp sampler - logp trainer| after a weight sync
    evaluation: EvaluationConfig = EvaluationConfig()


class TracesConfig(RunConfig, EngineConfig):
    """Stage 0: the teacher answers; answers are not checked (paper section 4.1)."""

    teacher: Path
    data: DataConfig
    sampling: SamplingConfig
    max_tokens: Positive = 8192  # prompt + response; longer or truncated traces are dropped
    prompts_per_shard: Positive = 512


class SftConfig(TrainConfig):
    """Stage 1: maximum likelihood on traces."""

    batch_size: Positive = 256  # sequences a step, over all ranks
    max_tokens: Positive = 8192
    pair_with: Path | None = None  # teacher whose tokenizer the student must share


class RlConfig(TrainConfig):
    """Stage 2: rollouts used twice."""

    teacher: Path | None = None  # needed when the objective has a KL term
    teacher_offload: bool = False  # its weights wait in CPU memory while it does not score
    prompts_per_step: Positive = 256  # over all ranks
    rollout: RolloutConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    samples_per_step: NonNegative = 8  # responses shown in samples.jsonl each step
    grader_workers: Positive = 2


class EvalConfig(RunConfig, EngineConfig):
    """Accuracy of one checkpoint directory on the evaluation sets."""

    checkpoint: Path
    evaluation: EvaluationConfig
    grader_workers: Positive = 2


class ExportConfig(Strict):
    """A training run's checkpoint as a directory that from_pretrained and vLLM load."""

    run: Path
    out: Path
    step: Positive | None = None  # the latest when absent
