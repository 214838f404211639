"""Sampling: the engine, its settings, and the rollouts of stage 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vold.config.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share, Strict, Url


class SamplingConfig(Strict):
    """Sampling of responses."""

    max_new_tokens: Positive
    """Tokens of the longest response."""
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Probability mass of the most probable tokens that are sampled from."""
    top_k: NonNegative = 0
    """Number of most probable tokens that are sampled from; 0: all."""
    sequences_per_call: Positive = 256
    """Responses generated side by side by the transformers engine; vLLM batches by itself."""


NOT_PASSED = re.compile(
    r"(model|dtype|max_model_len|enforce_eager|kv_cache_memory_bytes|generation_config|limit_mm_per_prompt|seed|host|port"
    r"|uds|middleware|max_logprobs|logprobs_mode|(tensor|pipeline|data)_parallel_.*|enable_sleep_mode|enable_scale_out"
    r"|trust_.*|.*code.*|.*_cls|.*tokenizer.*|hf_.*|.*load.*|.*revision.*|.*plugin.*|allowed_.*|.*media.*|.*processors?"
    r"|.*config_format|ssl_.*|api_key|root_path|.*chat_template.*|.*tool.*|.*transfer.*|.*executor.*|enable_lora|.*prompt_embeds)"
)
"""Options of vLLM that vold sets, or that would run other code, read other files or open other doors."""


class VllmConfig(Strict):
    """Settings of vLLM, with `engine: vllm`: an engine inside each process, or those that `vold serve` started."""

    urls: tuple[Url, ...] = ()
    """http://host:port, or unix:/path of the socket, of each engine of `vold serve`; empty: one engine inside each
    process."""
    secret_file: Path | None = None
    """File, of mode 600, with the secret that engines of `urls` ask for; made where it is missing; when null,
    engines.secret in run_dir."""
    kv_cache_gib: PositiveFloat = 8.0
    """GiB that an engine reserves for keys and values."""
    max_model_len: Positive | None = None
    """Prompt, image and response tokens of the longest sequence; the model's own limit when null."""
    enforce_eager: bool = False
    """Run without CUDA graphs: less memory, slower decoding."""
    sleep: bool = False
    """Free the GPU memory of an engine inside the process between calls; its weights wait in host memory."""
    tensor_parallel_size: Positive = 1
    """GPUs among which every layer of an engine is divided. Inside the process: with one process alone."""
    pipeline_parallel_size: Positive = 1
    """Stages of layers, each on tensor_parallel_size GPUs."""
    engine_options: dict[str, bool | int | float | str] = Field(default={})
    """Further engine arguments by vLLM's names, e.g. {max_num_seqs: 64, quantization: fp8}; what vold sets itself, and
    what would run or read other files, is refused."""
    transport: Literal["auto", "files", "nccl"] = "auto"
    """How new weights reach `urls`: files in `weights_dir`, or NCCL (gloo without GPUs). auto: nccl from GPUs to other
    machines, else files."""
    weights_dir: Path = Path("/dev/shm")
    """Folder for new weights until every engine of `urls` has read them."""
    timeout: PositiveFloat = 1800.0
    """Seconds that an engine of `urls` may take for one request."""
    retries: NonNegative = 2
    """Number of times that a failed request is sent again, to another engine."""
    restart_seconds: NonNegativeFloat = 120.0
    """Seconds to wait for an engine when none of `urls` answers."""

    @model_validator(mode="after")
    def _only_a_local_engine_sleeps(self):
        if self.sleep and self.urls:
            raise ValueError("vllm.sleep = true is for an engine inside the process; leave it out beside vllm.urls")
        return self

    @model_validator(mode="after")
    def _options_are_vllms_to_set(self):
        for name in self.engine_options:
            if NOT_PASSED.fullmatch(name) or not name.isidentifier():
                raise ValueError(
                    f"vllm.engine_options.{name} is not passed on: vold sets it, or it would run or read other files; "
                    "leave it out"
                )
        return self

    @property
    def gpus(self) -> int:
        """Workers of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class EngineConfig(Strict):
    """The engine that samples."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Library that samples responses."""
    vllm: VllmConfig = VllmConfig()
    """Settings of vLLM."""

    @property
    def batches_by_itself(self) -> bool:
        """The engine takes all prompts at once; smaller batches would leave it idle at their ends."""
        return self.engine == "vllm"


class DynamicSamplingConfig(Strict):
    """DAPO's dynamic sampling: some groups are dropped, and further prompts sampled in their place."""

    keep: Literal["gradient", "mixed"] = "gradient"
    """gradient: groups with a gradient under the objective; mixed: those with right and other answers, as DAPO has it,
    even where an overlong penalty or a teacher would give others a gradient."""

    max_prompts_factor: Annotated[float, Field(ge=1.0)] = 3.0
    """Prompts that a step may sample, in units of prompts_per_step."""


class CurriculumConfig(Strict):
    """Skips a prompt once when its last pass rate lay outside [lowest, highest]."""

    lowest: Share = 0.0
    """Smallest pass rate of a prompt that is not skipped."""
    highest: Share = 1.0
    """Largest pass rate of a prompt that is not skipped."""


class RolloutConfig(SamplingConfig, EngineConfig):
    """Sampling of stage 2."""

    responses_per_prompt: Annotated[int, Field(ge=1)] = 5
    """G, the size of a group."""
    lag: Annotated[int, Field(ge=0, le=16)] = 0
    """Updates that a token's weights may be old. 1: a step's rollouts are sampled while the step before trains, and
    weights are synced in between; more: so many steps are sampled side by side, responses go on over weight syncs, and
    sampling waits where a token could become older."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight of a token, with lag > 0 or minibatches > 1 (truncated importance sampling)."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Off when null."""
    curriculum: CurriculumConfig | None = None
    """Off when null."""
    router_replay: Literal["R2", "R3"] | None = None
    """The experts that a step trains a token through, of a mixture: R3: those that the sampler chose for it; R2, with
    minibatches > 1: those that the trainer chose before the step's first update; null: those that it chooses now."""

    @model_validator(mode="after")
    def _rollouts_are_sampled(self):
        if self.temperature == 0.0:
            raise ValueError("rollout.temperature = 0 gives identical responses; use a value > 0")
        return self
