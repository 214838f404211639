"""Token counts and models of one training step, derived from a config and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.initialization import no_init_weights

from vold.config.schema import DataConfig, RlConfig, SftConfig
from vold.models.adapters import VISUAL
from vold.models.architecture import Architecture
from vold.models.flops import adapter_parameters, language_model_parameters
from vold.models.served import ServedModel
from vold.models.student import build_student
from vold.models.vision import TOWERS
from vold.objectives import Objective, build_objective
from vold.parallel.launch import fake_layout, shutdown

TEXT_LAYOUTS = ("orz", "orz-eval", "gsm8k", "traces", "prompt-response")  # data layouts whose rows never hold an image


@dataclass(frozen=True)
class StepSizes:
    """One step of `config` on `processes` ranks. Counts are tokens, sequences or bytes.

    mean_response_tokens: assumed length of every response; None assumes the longest that the config allows.
    """

    config: SftConfig | RlConfig
    processes: int
    mean_response_tokens: int | None = None

    @cached_property
    def student(self) -> Architecture:
        return Architecture.from_pretrained(self.config.student)

    @cached_property
    def teacher(self) -> Architecture | None:
        """The teacher that scores inside the trainer; None where there is none or a vLLM engine scores."""
        objective = self.objective
        needed = objective is not None and objective.needs_teacher and not objective.uses_self_teacher
        if not needed or self.config.teacher is None or self.config.teacher_engine != "trainer":
            return None
        return Architecture.from_pretrained(self.config.teacher)

    @cached_property
    def objective(self) -> Objective | None:
        """None in SFT."""
        if isinstance(self.config, SftConfig):
            return None
        return build_objective(self.config.objective, self.config.rollout.max_new_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return getattr(torch, self.config.dtype)

    @cached_property
    def trained_parameters(self) -> int:
        """Parameters with gradient and optimizer state. Leaves this process without process groups where `train` or
        vision.train_merger chooses them."""
        adapter, train, train_merger = self.config.adapter, self.config.train, self.config.vision.train_merger
        is_visual = adapter is not None and not set(VISUAL).isdisjoint(adapter.targets)
        if train is not None or train_merger or is_visual:
            layout = fake_layout(0, 1)
            with torch.device("meta"):
                chunks = build_student(
                    self.student, layout, self.dtype, train=train, train_merger=train_merger, adapter=adapter
                )
            shutdown()
            return sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
        if adapter is None:
            return language_model_parameters(self.student)
        return adapter_parameters(self.student, adapter.rank, adapter.targets)

    @property
    def has_full_divergence(self) -> bool:
        """True where the loss compares whole next-token distributions (linear_kl)."""
        return self.objective is not None and self.objective.divergence is not None

    # Tokens ----------------------------------------------------------------------------------------------------------

    @property
    def dp(self) -> int:
        """Copies of the model."""
        parallel = self.config.parallel
        return self.processes // (parallel.tp * parallel.pp * parallel.cp)

    @property
    def responses_per_prompt(self) -> int:
        return self.config.rollout.responses_per_prompt if isinstance(self.config, RlConfig) else 1

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt. An SFT sequence counts as response but for one token: the data are not read."""
        return self.config.prompt.max_tokens if isinstance(self.config, RlConfig) else 1

    @property
    def response_tokens(self) -> int:
        longest = (
            self.config.rollout.max_new_tokens if isinstance(self.config, RlConfig) else self.config.max_tokens - 1
        )
        return min(self.mean_response_tokens or longest, longest)

    @property
    def prompts_per_replica(self) -> int:
        """Prompts of a step that one copy of the model trains on."""
        prompts = self.config.prompts_per_step if isinstance(self.config, RlConfig) else self.config.batch_size
        return -(-prompts // self.dp)

    @property
    def responses_per_replica(self) -> int:
        return self.prompts_per_replica * self.responses_per_prompt

    @property
    def tokens_per_replica(self) -> int:
        """Packed tokens of a step; a prompt is packed once for all its responses."""
        return self.prompts_per_replica * self.prompt_tokens + self.responses_per_replica * self.response_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return min(self.config.microbatch_tokens, self.tokens_per_replica)

    @property
    def micro_batches(self) -> int:
        return -(-self.tokens_per_replica // self.micro_batch_tokens)

    # Bytes of what is not divided over ranks -------------------------------------------------------------------------

    @property
    def has_images(self) -> bool:
        """True where the student's vision tower is used: a training or evaluation set may hold images."""
        datasets: list[DataConfig] = [self.config.data, *self.config.evaluation.sets.values()]
        return self.student.vision is not None and any(data.layout not in TEXT_LAYOUTS for data in datasets)

    @cached_property
    def student_tower_bytes(self) -> float:
        return self._tower_bytes(self.student)

    @cached_property
    def teacher_tower_bytes(self) -> float:
        return self._tower_bytes(self.teacher)

    def _tower_bytes(self, arch: Architecture) -> float:
        if not self.has_images or arch.vision is None:
            return 0.0
        with torch.device("meta"), no_init_weights():
            tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config)
        return float(sum(p.numel() for p in tower.parameters()) * self.dtype.itemsize)

    @property
    def hidden_teacher_bytes(self) -> float:
        """The teacher's hidden states of this rank's share of a step's responses, kept where the loss compares whole
        distributions."""
        tokens = self.responses_per_replica * self.response_tokens / self.config.parallel.cp
        return float(tokens * self._teacher_width * self.dtype.itemsize)

    @property
    def engine_head_bytes(self) -> float:
        """This rank's share of the head of a teacher in vLLM, whose hidden states come over the network."""
        if self.teacher is not None:
            return 0.0
        return float(self.student.vocab * self._teacher_width * self.dtype.itemsize / self.config.parallel.tp)

    @cached_property
    def _teacher_width(self) -> int:
        """Hidden width of the teacher where the loss compares whole distributions, else 0."""
        objective, config = self.objective, self.config
        if not isinstance(config, RlConfig) or config.teacher is None or not self.has_full_divergence:
            return 0
        if objective is None or not objective.needs_teacher:
            return 0
        return ServedModel.from_pretrained(config.teacher).hidden
