"""Token counts and models of one training step, derived from a config and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
from vold.objectives.divergences import VocabularyDivergence, build_divergence
from vold.parallel.launch import fake_layout, shutdown

TOP_BYTES = 12  # of one of a teacher's most probable ids: int64, and its log-prob in fp32
TEXT_LAYOUTS = ("orz", "orz-eval", "gsm8k", "traces", "prompt-response")  # data layouts whose rows never hold an image


@dataclass(frozen=True)
class TrainerTeacher:
    """A teacher that scores inside the trainer. is_base: it is the student without its adapter, no second copy."""

    arch: Architecture
    offload: bool
    is_base: bool


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
    def trainer_teachers(self) -> tuple[TrainerTeacher, ...]:
        """The teachers that score inside the trainer, one (`teacher`) or several (`teachers`)."""
        config = self.config
        found = [(path, offload) for path, engine, offload, _ in self._config_teachers if engine == "trainer"]
        advantage = isinstance(config, RlConfig) and config.objective.visual_advantage
        return tuple(
            TrainerTeacher(Architecture.from_pretrained(path), offload, not advantage and config.is_base(path))
            for path, offload in found
        )

    @property
    def scoring_teachers(self) -> int:
        """All teachers of the objective, inside the trainer or not."""
        return len(self._config_teachers)

    @property
    def teacher(self) -> Architecture | None:
        """The first of `trainer_teachers`; None where there is none or engines score."""
        return next((teacher.arch for teacher in self.trainer_teachers), None)

    @cached_property
    def _config_teachers(self) -> list[tuple[Path, str, bool, VocabularyDivergence | None]]:
        """(checkpoint, engine, offload, divergence of whole distributions) of each teacher that the objective needs."""
        config, objective = self.config, self.objective
        if not isinstance(config, RlConfig) or objective is None:
            return []
        if not objective.needs_teacher or objective.uses_self_teacher:
            return []
        if config.teacher is not None:
            return [(config.teacher, config.teacher_engine, config.teacher_offload, objective.divergence)]
        return [
            (
                teacher.path,
                teacher.engine,
                teacher.offload,
                objective.divergence if teacher.divergence is None else build_divergence(teacher.divergence),
            )
            for teacher in config.teachers.values()
        ]

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
        if self.objective is not None and self.objective.divergence is not None:
            return True
        return any(divergence for *_, divergence in self._config_teachers)

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
    def teacher_tower_bytes(self) -> tuple[float, ...]:
        """Of each of `trainer_teachers`."""
        return tuple(0.0 if t.is_base else self._tower_bytes(t.arch) for t in self.trainer_teachers)

    def _tower_bytes(self, arch: Architecture) -> float:
        if not self.has_images or arch.vision is None:
            return 0.0
        with torch.device("meta"), no_init_weights():
            tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config)
        return float(sum(p.numel() for p in tower.parameters()) * self.dtype.itemsize)

    @property
    def hidden_teacher_bytes(self) -> float:
        """What a divergence of whole distributions keeps of this rank's share of a step's responses: the teachers'
        hidden states, or a server's most probable ids. Of several teachers each may have all responses."""
        tokens = self.responses_per_replica * self.response_tokens / self.config.parallel.cp
        sizes = [
            TOP_BYTES * (divergence.top_k or 0)
            if engine == "openai"
            else ServedModel.from_pretrained(path).hidden * self.dtype.itemsize
            for path, engine, _, divergence in self._config_teachers
            if divergence is not None
        ]
        return float(tokens * sum(sizes))

    @property
    def engine_head_bytes(self) -> float:
        """This rank's share of the heads of teachers in vLLM whose hidden states come over the network."""
        widths = [
            ServedModel.from_pretrained(path).hidden
            for path, engine, _, divergence in self._config_teachers
            if engine == "vllm" and divergence is not None
        ]
        return float(self.student.vocab * sum(widths) * self.dtype.itemsize / self.config.parallel.tp)
