"""What a config's step holds on each rank, by phase and by what it is for. Nothing is loaded: config.json is enough.

Of one place in a model copy: its data-parallel ranks hold the same, and its tensor-parallel ranks equally much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.initialization import no_init_weights

from vold.config.schema import DataConfig, RlConfig, SamplingConfig, SftConfig
from vold.models.architecture import Architecture
from vold.models.flops import language_model_parameters
from vold.models.language_model import LanguageModel, build_chunks
from vold.models.vision import TOWERS
from vold.objectives import Objective, build_objective
from vold.parallel.launch import Layout, fake_layout, shutdown
from vold.planning.meta_memory import (
    TrainingPeak,
    average_bytes,
    packed_on_meta,
    pass_through,
    state_bytes,
    training_peak,
)
from vold.rollout.transformers.decode import RoomyLayer
from vold_kernels.chunks import default_budget

TEXT_LAYOUTS = ("orz", "orz-eval", "gsm8k", "traces", "prompt-response")  # whose rows never hold an image
BATCH_BYTES = 7 * 8 + 8 + 6 * 4  # of a packed token: MicroBatch's integers, its index of keys, its floats
SCORES = 5  # vectors over the vocabulary that decode._draw has in fp32 at once, beside the logits


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank at one place in the model copy. `resident`: there in every phase; `phases`: phase -> what it
    adds; `host`: in CPU memory."""

    layout: Layout
    parameters: int
    resident: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: float = 0.0

    @property
    def name(self) -> str:
        return f"pp {self.layout.pp_rank}" if self.layout.pp > 1 else "every rank"

    def total(self, phase: str) -> float:
        return sum(self.resident.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        return max(map(self.total, self.phases))


@dataclass(frozen=True)
class Traced:
    """Bytes of one stage's models that no choice of sampler, optimizer or offloading changes."""

    parameters: int
    largest: int
    takes_images: bool
    train: TrainingPeak
    teacher: float = 0.0  # weights
    scoring: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """A step of `config` on so many processes, in tokens. `response`: of a response, the longest allowed unless a mean
    is known."""

    config: SftConfig | RlConfig
    processes: int
    response_tokens: int | None = None

    @cached_property
    def student(self) -> Architecture:
        return Architecture.from_pretrained(self.config.student)

    @cached_property
    def teacher(self) -> Architecture | None:
        """The one that scores in the trainer."""
        objective = self.objective
        asked = objective is not None and objective.needs_teacher and not objective.teaches_itself
        if not asked or self.config.teacher is None or self.config.teacher_engine != "trainer":
            return None
        return Architecture.from_pretrained(self.config.teacher)

    @cached_property
    def objective(self) -> Objective | None:
        if isinstance(self.config, SftConfig):
            return None
        return build_objective(self.config.objective, self.config.rollout.max_new_tokens)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.config.dtype).itemsize

    @property
    def compares_whole(self) -> bool:
        """Whether the objective is of whole distributions (linear_kl)."""
        return self.objective is not None and self.objective.divergence is not None

    @property
    def copies(self) -> int:
        return self.processes // (self.config.parallel.tp * self.config.parallel.pp)

    @property
    def siblings(self) -> int:
        return self.config.rollout.responses_per_prompt if isinstance(self.config, RlConfig) else 1

    @property
    def prompt(self) -> int:
        """Of an SFT sequence the prompt is not known apart: it is taken as trained on, too."""
        return self.config.prompt.max_tokens if isinstance(self.config, RlConfig) else 1

    @property
    def response(self) -> int:
        longest = (
            self.config.rollout.max_new_tokens if isinstance(self.config, RlConfig) else self.config.max_tokens - 1
        )
        return min(self.response_tokens or longest, longest)

    @property
    def prompts_per_copy(self) -> int:
        """Of a step."""
        of_all = self.config.prompts_per_step if isinstance(self.config, RlConfig) else self.config.batch_size
        return -(-of_all // self.copies)

    @property
    def tokens_per_copy(self) -> int:
        """Packed, of a step: a prompt is read once for its responses."""
        return self.prompts_per_copy * (self.prompt + self.siblings * self.response)

    @property
    def micro_batch(self) -> int:
        return min(self.config.microbatch_tokens, self.tokens_per_copy)

    @property
    def micro_batches(self) -> int:
        return -(-self.tokens_per_copy // self.micro_batch)

    @property
    def sees(self) -> bool:
        """Whether the student's vision tower is read: some set may hold images."""
        sets: list[DataConfig] = [self.config.data, *self.config.evaluation.sets.values()]
        return self.student.vision is not None and any(data.layout not in TEXT_LAYOUTS for data in sets)

    @cached_property
    def tower_bytes(self) -> float:
        return self._tower_bytes(self.student)

    @cached_property
    def teacher_tower_bytes(self) -> float:
        return self._tower_bytes(self.teacher)

    def _tower_bytes(self, arch: Architecture) -> float:
        if not self.sees or arch.vision is None:
            return 0.0
        with torch.device("meta"), no_init_weights():
            tower = TOWERS[arch.model_type]._from_config(arch.vision.tower_config)
        return float(sum(p.numel() for p in tower.parameters()) * self.itemsize)

    @property
    def hidden_teacher_bytes(self) -> float:
        """The teacher's hidden states of a step's tokens, where whole distributions are compared."""
        if not self.compares_whole or self.teacher is None:
            return 0.0
        scored = self.prompts_per_copy * self.siblings * self.response
        return float(scored * self.teacher.hidden * self.itemsize)


Traces = dict[tuple, Traced]


def places(sizes: Sizes, device: str, traces: Traces | None = None) -> list[StageMemory]:
    """One for each pipeline stage, as on `device` ("cuda" or "cpu"). Raises ValueError where the layout fits neither
    the processes nor the models. Leaves this process without process groups; it must see no GPU. `traces`: of plans
    before, which this one adds to."""
    traces = {} if traces is None else traces
    parallel = sizes.config.parallel
    divided = parallel.model_copy(update={"distributed_optimizer": False})
    found = []
    try:
        for stage in range(parallel.pp):
            layout = fake_layout(stage * (sizes.processes // parallel.pp), sizes.processes, **parallel.model_dump())
            key = (divided, sizes.processes, stage, sizes.micro_batch, sizes.micro_batches, device)
            if key not in traces:
                traces[key] = _trace(sizes, layout, device)
            found.append(_place(sizes, layout, traces[key], device))
    finally:
        shutdown()
    return found


def _trace(sizes: Sizes, layout: Layout, device: str) -> Traced:
    config, dtype = sizes.config, getattr(torch, sizes.config.dtype)
    tokens, losses = packed_on_meta(sizes.micro_batch, sizes.prompt, sizes.response, sizes.siblings)
    chunks = _on_meta(sizes.student, layout, dtype, train_merger=config.vision.train_merger)
    counts = [parameter.numel() for chunk in chunks for parameter in chunk.parameters()]
    options = {"micro_batches": sizes.micro_batches, "device": device, "two_heads": sizes.compares_whole}
    train = training_peak(chunks, tokens, losses, **options)
    student = (sum(counts), max(counts), any(chunk.vision_levels for chunk in chunks), train)
    if sizes.teacher is None:
        return Traced(*student)
    chunks = _on_meta(sizes.teacher, layout, dtype)
    weights = dtype.itemsize * sum(p.numel() for chunk in chunks for p in chunk.parameters())
    scoring = max(pass_through(chunk, tokens, device=device, train=False).peak for chunk in chunks)
    if layout.is_last_stage:
        scoring += default_budget(torch.device(device)).tile_bytes + losses * sizes.teacher.hidden * dtype.itemsize
    return Traced(*student, weights, scoring)


def _on_meta(arch: Architecture, layout: Layout, dtype: torch.dtype, **options) -> list[LanguageModel]:
    with torch.device("meta"):
        return build_chunks(arch, layout, dtype, **options)


def _place(sizes: Sizes, layout: Layout, traced: Traced, device: str) -> StageMemory:
    config, dtype = sizes.config, getattr(torch, sizes.config.dtype)
    state = state_bytes(traced.parameters, traced.largest, layout, dtype, device)
    resident = {name: state[name] for name in ("weights", "gradients", "optimizer")}
    resident["vision"] = sizes.tower_bytes if traced.takes_images else 0.0
    batch, host = float(BATCH_BYTES * sizes.tokens_per_copy), 0.0
    phases = {}
    if sizes.objective is not None and sizes.objective.teaches_itself:
        resident["teacher"] = average_bytes(traced.parameters, dtype)
    elif sizes.teacher is not None:
        phases["teacher"] = {"working": traced.scoring, "batch": batch}
        weights = traced.teacher + (sizes.teacher_tower_bytes if layout.is_first_stage else 0)
        host = weights if config.teacher_offload else 0.0
        (phases["teacher"] if config.teacher_offload else resident)["teacher"] = weights
    whole = sizes.hidden_teacher_bytes if layout.is_last_stage else 0
    train = {"activations": traced.train.activations, "working": traced.train.working, "batch": batch + whole}
    phases |= {"train": train, "update": {"working": state["update"]}}
    for phase, sampling, siblings in _sampled(sizes):
        resident["sampler"], phases[phase] = _sampler(sizes, sampling, siblings)
    order = [name for name in ("rollout", "teacher", "train", "update", "evaluate") if name in phases]
    return StageMemory(layout, traced.parameters, resident, {name: phases[name] for name in order}, host)


# The sampler ---------------------------------------------------------------------------------------------------------


def _sampled(sizes: Sizes) -> list[tuple[str, SamplingConfig, int]]:
    """(phase, how, responses a prompt) of whatever this rank samples itself."""
    config, found = sizes.config, []
    if config.evaluation.every and config.evaluation.sets:
        found.append(("evaluate", config.evaluation.sampling, config.evaluation.responses_per_problem))
    if isinstance(config, RlConfig):
        found.append(("rollout", config.rollout, config.rollout.responses_per_prompt))
    return found


def _sampler(sizes: Sizes, sampling: SamplingConfig, siblings: int) -> tuple[float, dict[str, float]]:
    """(what stays, what drawing adds). Every rank has a whole copy of the student."""
    config, arch, size = sizes.config, sizes.student, sizes.itemsize
    weights = language_model_parameters(arch) * size + sizes.tower_bytes
    if isinstance(config, RlConfig) and config.rollout.engine == "vllm":
        vllm = config.rollout.vllm
        cache = vllm.kv_cache_gib * 2**30
        if vllm.urls:
            return 0.0, {"KV cache": 0.0}
        return (0.0, {"sampler": weights, "KV cache": cache}) if vllm.sleep else (weights + cache, {"KV cache": 0.0})
    rows = sampling.sequences_per_call
    step = RoomyLayer.ROOM + 1  # tokens that the cache grows by
    length = config.prompt.max_tokens + -(-(sampling.max_new_tokens - 1) // step) * step
    token = rows * kv_bytes(arch, size)
    cache = token * length + token / arch.layers * (length - step)  # copied a layer at a time when it grows
    drawing = rows * arch.vocab * (size + SCORES * 4)
    # Prompts are read before their keys and values are there once for every response.
    prompts = -(-rows // siblings) * config.prompt.max_tokens
    read = prompts * ((3 * arch.ffn + 4 * arch.hidden) * size + kv_bytes(arch, size))
    return weights, {"KV cache": cache, "working": max(drawing, read - cache)}


def kv_bytes(arch: Architecture, itemsize: int) -> int:
    """Keys and values of one token."""
    return 2 * arch.layers * arch.kv_heads * arch.head_dim * itemsize
