"""Evaluation during and after training, and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vold.config.schema.base import NonNegative, Positive, Strict
from vold.config.schema.data import DataConfig
from vold.config.schema.rollout import EngineConfig, SamplingConfig
from vold.config.schema.run import RunConfig


class EvaluationConfig(Strict):
    """Named problem sets and how they are answered."""

    sets: dict[str, DataConfig] = Field(default={})
    """Name of a set: its data."""
    every: NonNegative = 0
    """Steps between evaluations during training; 0: never."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=2048, temperature=0.0)
    """Greedy, up to 2048 tokens, when left out."""
    responses_per_problem: Positive = 1
    """k of avg@k and maj@k."""
    best: str | None = None
    """A set: the checkpoint with the highest accuracy on it is kept too (`vold export` step=best)."""

    @model_validator(mode="after")
    def _best_is_evaluated(self):
        if self.best is not None and self.best not in self.sets:
            raise ValueError(
                f"evaluation.best = {self.best!r} is none of evaluation.sets: {', '.join(self.sets) or 'empty'}"
            )
        if self.best is not None and not self.every:
            raise ValueError(f"evaluation.best = {self.best!r} compares steps; set evaluation.every > 0, or best=null")
        return self

    @model_validator(mode="after")
    def _something_is_evaluated(self):
        if self.every and not self.sets:
            raise ValueError(f"evaluation.every = {self.every}, but evaluation.sets is empty; name a set, or every=0")
        return self

    @model_validator(mode="after")
    def _several_answers_are_sampled(self):
        if self.responses_per_problem > 1 and self.sampling.temperature == 0.0:
            raise ValueError(
                f"evaluation.responses_per_problem = {self.responses_per_problem} greedy answers are all the same; set "
                "evaluation.sampling.temperature > 0, or responses_per_problem=1"
            )
        return self


class VlmevalkitConfig(Strict):
    """Settings of VLMEvalKit; the pixel limits are its own for Qwen2.5-VL."""

    judge: Literal["rule", "model"] = "rule"
    """rule: the kit's rules; model: GPT-4o-mini, the paper's (section 4.1), called with OPENAI_API_KEY."""
    min_pixels: Positive = 1280 * 28 * 28
    """Images are enlarged to at least this many pixels."""
    max_pixels: Positive = 16384 * 28 * 28
    """Images are reduced to at most this many pixels."""
    max_new_tokens: Annotated[int, Field(ge=8192)] = 8192
    """Tokens of the longest response; reasoning that is cut off has no answer."""


class EvalConfig(RunConfig, EngineConfig):
    """`vold eval`: accuracy of one checkpoint directory on the evaluation sets."""

    checkpoint: Path
    """Directory in transformers' format."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Problem sets and sampling."""
    vlmevalkit: VlmevalkitConfig = VlmevalkitConfig()
    """Settings of `vold eval` with `--vlmevalkit`."""
    grader_workers: Positive = 2
    """Processes that grade answers."""
    grader_echo: bool = True
    """An answer that is copied from the prompt, and not spelled as the gold answer, is wrong (rule `echo`)."""


class ExportConfig(Strict):
    """`vold export`: a training run's checkpoint as a directory that from_pretrained and vLLM load."""

    run: Path
    """Run directory."""
    out: Path
    """Directory to write."""
    step: Positive | Literal["best"] | None = None
    """The latest step when null; best: see evaluation.best."""
    adapter: bool = False
    """Write a run's LoRA adapter alone, as a directory that peft's PeftModel.from_pretrained and vLLM load, instead of
    the whole model with the adapter merged."""
