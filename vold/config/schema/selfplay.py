"""Self-play: challenger and solver train each other (R-Zero, R-Diverse)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from vold.config.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share, Strict
from vold.config.schema.evaluation import EvaluationConfig
from vold.config.schema.objective import ObjectiveConfig
from vold.config.schema.rollout import EngineConfig, RolloutConfig
from vold.config.schema.run import RunConfig
from vold.config.schema.training import OptimizerConfig


class PoseConfig(Strict):
    """The challenger's request for a question, and the filter of its responses (R-Zero)."""

    request: str = (
        "Write one new, challenging mathematics problem that has a single answer. Put the problem, and nothing else, "
        "between <question> and </question>."
    )
    """User message that requests a question."""
    system: str | None = None
    """System message; none when null."""
    pattern: str = r"<question>\s*(.+?)\s*</question>"
    """Regular expression; group 1 of its last match in a response is the question."""
    candidates: Positive = 8000
    """Responses sampled from the trained challenger, over all ranks."""
    repetition_weight: NonNegativeFloat = 1.0
    """Weight of the repetition penalty |cluster| / B in the challenger's reward."""
    cluster_distance: PositiveFloat = 0.5
    """Distance (1 - BLEU; 1 - cosine with an embedder) below which questions of a step form one cluster."""

    @model_validator(mode="after")
    def _pattern_has_a_group(self):
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pose.pattern = {self.pattern!r} is no regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"pose.pattern = {self.pattern!r} has no group; put the question's part in (...)")
        return self


class AnswersConfig(Strict):
    """The solver's answers to a posed question, and how many must agree for the solver to train on it."""

    responses: Annotated[int, Field(ge=2)] = 10
    """Answers to each question."""
    lowest: NonNegative = 3
    """Fewest answers that agree with the majority."""
    highest: Positive = 7
    """Most answers that agree with the majority."""

    @model_validator(mode="after")
    def _range(self):
        if not self.lowest <= self.highest <= self.responses:
            raise ValueError(
                f"answers.lowest = {self.lowest}, highest = {self.highest}, responses = {self.responses}: must ascend"
            )
        return self


class MemoryConfig(Strict):
    """R-Diverse's memory (MAP): a penalty on questions like those in the bank, and replay of old ones to the solver."""

    weight: NonNegativeFloat = 1.0
    """Weight of the penalty P in the challenger's reward."""
    gamma: Share = 0.5
    """P = gamma * term of the nearest question + (1 - gamma) * term of the mean."""
    nearest_allowed: float = 0.5
    """Cosine similarity to the nearest question that has no penalty."""
    mean_allowed: float = 0.25
    """Mean cosine similarity to the bank that has no penalty."""
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of old questions in each solver batch, once the bank holds any."""


class CoderConfig(EngineConfig):
    """R-Diverse's coder (SAM): questions are compared by the code that solves them, sampled greedily."""

    checkpoint: Path
    """Checkpoint directory of the code model."""
    request: str = (
        "Write a Python program that solves the following problem. Give only the code, in one block.\n\n{question}"
    )
    """User message."""
    max_new_tokens: Positive = 1024
    """Tokens of the longest program."""
    sequences_per_call: Positive = 256
    """Programs generated side by side by the transformers engine."""


class SelfplayPhaseConfig(Strict):
    """Training of challenger or solver in each iteration."""

    optimizer: OptimizerConfig
    """Optimizer and learning rate."""
    steps: Positive
    """Steps per iteration."""
    prompts_per_step: Positive
    """Prompts per step, over all ranks."""
    minibatches: Positive = 1
    """Updates that a step's prompts are divided among; at 1 no ratio is clipped."""
    rollout: RolloutConfig
    """Sampling."""
    objective: ObjectiveConfig = ObjectiveConfig(preset="grpo")
    """Method; preset grpo when left out."""
    save_every: NonNegative = 10
    """Steps between checkpoints; 0: only the last step."""


class SelfplayConfig(RunConfig):
    """`vold selfplay`: challenger and solver train each other from one checkpoint, without data and teacher."""

    student: Path
    """Checkpoint directory that both start from."""
    iterations: Positive = 5
    """Rounds of challenger, then solver."""
    pose: PoseConfig = PoseConfig()
    """Questions of the challenger."""
    answers: AnswersConfig = AnswersConfig()
    """Answers of the solver."""
    memory: MemoryConfig | None = None
    """MAP; off when null; needs an embedder."""
    embedder: Path | None = None
    """Directory of an encoder that embeds questions, or their code."""
    coder: CoderConfig | None = None
    """SAM; off when null; needs an embedder."""
    challenger: SelfplayPhaseConfig
    """Training of the challenger."""
    solver: SelfplayPhaseConfig
    """Training of the solver."""
    microbatch_tokens: Positive = 16384
    """Packed tokens of one forward and backward pass on a rank."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation of the solver at the end of each iteration."""
    samples_per_step: NonNegative = 8
    """Responses per step that are written to samples.jsonl."""
    grader_workers: Positive = 2
    """Processes per rank that grade answers."""
    grader_echo: bool = True
    """An answer that is copied from the prompt, and not spelled as the gold answer, is wrong (rule `echo`)."""

    @model_validator(mode="after")
    def _embedder_is_there(self):
        if self.embedder is None and (self.memory or self.coder):
            wanting = "memory" if self.memory else "coder"
            raise ValueError(f"{wanting} compares embeddings and embedder is not set; set embedder: PATH")
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self):
        for name, phase in (("challenger", self.challenger), ("solver", self.solver)):
            if phase.minibatches > phase.prompts_per_step:
                raise ValueError(
                    f"{name}.minibatches = {phase.minibatches} exceeds {name}.prompts_per_step = "
                    f"{phase.prompts_per_step}; lower it"
                )
            if phase.rollout.vllm.urls:
                raise ValueError(
                    f"{name}.rollout.vllm.urls names engines that hold one checkpoint, and self-play asks several: "
                    "leave it out, engines then live inside the process"
                )
            longest = self.prompt.max_tokens + phase.rollout.max_new_tokens
            if longest > self.microbatch_tokens:
                raise ValueError(
                    f"microbatch_tokens = {self.microbatch_tokens} cannot hold prompt.max_tokens + "
                    f"{name}.rollout.max_new_tokens = {longest}; raise it or lower those"
                )
        if self.challenger.rollout.dynamic_sampling or self.challenger.rollout.curriculum:
            raise ValueError(
                "challenger.rollout.dynamic_sampling and curriculum look at rewards before the step's questions are "
                "compared; leave them out (the solver may have them)"
            )
        return self
