"""Keys of every command that writes a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vold.config.schema.base import NonNegative, Positive, Strict
from vold.config.schema.data import PromptConfig
from vold.config.schema.rollout import VllmConfig

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # short names -> torch's
SECRET = "engines.secret"
"""File of run_dir, see vllm.secret_file."""


def _torch_name(value: object) -> object:
    return DTYPES.get(value, value) if isinstance(value, str) else value


def listed(value: object) -> object:
    """`loggers=wandb` as `loggers=[wandb]`."""
    return value.split(",") if isinstance(value, str) else value


class ParallelConfig(Strict):
    """Division of one copy of the model over ranks, student and teacher alike; the other ranks are data parallel."""

    tp: Positive = 1
    """Tensor parallel: ranks that share each layer."""
    pp: Positive = 1
    """Pipeline parallel: consecutive stages of layers."""
    cp: Positive = 1
    """Context parallel: ranks that share the tokens of a micro-batch, for long responses. Attention exchanges them for
    heads, so cp divides the query heads of a tensor-parallel rank."""
    vpp: Annotated[int, Field(ge=2)] | None = None
    """Interleaved pipeline: stages that each rank holds."""
    sp: bool = False
    """Sequence parallel: norms and residuals divided over the tp ranks too."""
    ep: Positive = 1
    """Expert parallel: ranks of a pipeline stage that each hold other experts of a mixture; it may span tp and data
    parallel ranks."""
    etp: Positive = 1
    """Ranks that share each expert, as tp does other layers."""
    distributed_optimizer: bool = False
    """fp32 master weights and Adam's moments divided over the data-parallel and context-parallel ranks."""
    recompute: Literal["none", "swiglu", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, products of the gates (SwiGLU), whole MLPs, whole layers."""
    offload_activations: bool = False
    """What the backward pass needs waits in CPU memory, tensors from 1 MiB on, also with recompute, whose inputs of
    layers it then moves. Same results; the transfers cost time."""
    deterministic: bool = False
    """On GPUs, sums in a fixed order, so that two runs are bit-equal as they are on a CPU: attention's backward pass is
    then slower and takes more memory. Without it runs on CUDA differ in the last bits."""

    @model_validator(mode="after")
    def _one_way_to_save(self) -> ParallelConfig:
        if self.recompute == "swiglu" and self.offload_activations:
            raise ValueError(
                "parallel.recompute = swiglu and offload_activations = true: what a recomputation reads would stay on "
                "the GPU; use recompute = none or selective with it"
            )
        return self


class TrackingConfig(Strict):
    """What a run is called in wandb and trackio."""

    project: str = "vold"
    """Project that the run belongs to."""
    name: str | None = None
    """Name of the run; null: the name of run_dir. trackio's ends in some digits of the run's id."""
    group: str | None = None
    """Group of runs within the project."""
    entity: str | None = None
    """wandb: user or team that owns the project; null: wandb's own default."""
    tags: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """wandb: labels of the run."""


class RunConfig(Strict):
    """Common to all commands that write a run directory."""

    run_dir: Path
    """Directory for metrics, checkpoints and samples."""
    seed: NonNegative = 0
    """Seed of data order and sampling."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(_torch_name)] = "bfloat16"
    """Precision of weights and activations; master weights and moments are fp32."""
    parallel: ParallelConfig = ParallelConfig()
    """Division of the model over ranks."""
    timeout_seconds: Positive = 1800
    """Seconds that ranks wait for another in a collective; then the job ends with an error that names that rank."""
    prompt: PromptConfig = PromptConfig()
    """Rendering of problems."""
    loggers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(listed)] = ()
    """Experiment trackers that get the metrics, besides metrics.jsonl."""
    tracking: TrackingConfig = TrackingConfig()
    """Names of the run in the trackers."""

    @model_validator(mode="after")
    def _engines_ask_for_this_runs_secret(self):
        for name, section in _with_secret(self, self.run_dir / SECRET).items():
            object.__setattr__(self, name, section)  # frozen for everyone else
        return self


def _with_secret(section: Strict, path: Path) -> dict[str, Any]:
    """Of a section's own sections those that change: vllm.secret_file gets `path` where engines have urls and no file
    is given."""
    changed: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, VllmConfig) and value.urls and value.secret_file is None:
            changed[name] = value.model_copy(update={"secret_file": path})
        elif isinstance(value, dict):
            sections = {key: _with_secret(part, path) for key, part in value.items() if isinstance(part, Strict)}
            if any(sections.values()):
                changed[name] = {key: part.model_copy(update=sections.get(key, {})) for key, part in value.items()}
        elif isinstance(value, Strict) and (inner := _with_secret(value, path)):
            changed[name] = value.model_copy(update=inner)
    return changed
