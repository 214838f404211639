"""Memory of a training step by pipeline stage, phase and component, counted from each checkpoint's config.json.

Nothing is loaded. All ranks of a pipeline stage hold the same number of bytes: its data-parallel and context-parallel
ranks the same weights, its tensor-parallel ranks equal parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vold.config.schema import RlConfig, SamplingConfig
from vold.models.architecture import Architecture, check_expert_sizes
from vold.models.flops import language_model_parameters
from vold.models.language_model import build_chunks, has_tower
from vold.models.quantised import BYTES as QUANTISED_BYTES
from vold.models.quantised import decoder_linears
from vold.models.student import build_student
from vold.parallel.launch import Layout, fake_layout, shutdown
from vold.planning.meta_memory import (
    TrainingPeak,
    average_bytes,
    own_state,
    packed_on_meta,
    run_micro_batch,
    state_masters,
    tower_kept_bytes,
    training_peak,
    training_state_bytes,
    update_bytes,
)
from vold.planning.step_sizes import StepSizes
from vold.rollout.transformers.decode import PreallocatedLayer
from vold.rollout.transformers.shared_prompt import SPARE_TOKENS
from vold_kernels.chunks import default_budget

BATCH_BYTES = 7 * 8 + 8 + 6 * 4  # bytes of a packed token: MicroBatch's integers, its index of keys, its floats
SCORE_VECTORS = 5  # fp32 vectors over the vocabulary that decode._draw holds beside the logits
PHASES = ("start", "rollout", "teacher", "train", "update", "evaluate")  # in the order of a step


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage.

    models: role (weights, gradients, optimizer, teacher, sampler) -> bytes, without frozen vision towers.
    resident: component -> bytes present in every phase. phases: phase -> component -> bytes the phase adds.
    host: bytes in CPU memory.
    """

    layout: Layout
    models: dict[str, float]
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
class StageTrace:
    """Measurements of one pipeline stage's run on the meta device, in bytes but for `trained` (`experts` of these are a
    mixture's), `frozen` (`quantised` of these are held in fewer bits) and `largest_trained` (elements). Independent of
    sampler, optimizer division and offloading."""

    trained: int
    experts: int
    frozen: int
    largest_trained: int
    takes_images: bool
    train: TrainingPeak
    quantised: int = 0
    teacher_weights: tuple[float, ...] = ()  # of each of StepSizes.trainer_teachers
    teacher_working: float = 0.0


TraceCache = dict[tuple, StageTrace]


def stage_memories(sizes: StepSizes, device: str, cache: TraceCache | None = None) -> list[StageMemory]:
    """Memory of every pipeline stage on `device` ("cuda" or "cpu"); `cache` keeps traces from call to call.

    Raises ValueError where the layout fits neither the processes nor the models. Leaves this process without process
    groups; no GPU may be visible to it.
    """
    cache = {} if cache is None else cache
    models = (sizes.student, *(teacher.arch for teacher in sizes.trainer_teachers))
    check_expert_sizes(sizes.config.parallel.ep, sizes.config.parallel.etp, *models)
    parallel = sizes.config.parallel
    traced_layout = parallel.model_copy(update={"distributed_optimizer": False})  # a trace does not depend on it
    stages = []
    try:
        for stage in range(parallel.pp):
            layout = fake_layout(stage * (sizes.processes // parallel.pp), sizes.processes, **parallel.model_dump())
            key = (traced_layout, sizes.processes, stage, sizes.micro_batch_tokens, sizes.micro_batches, device)
            if key not in cache:
                cache[key] = _trace_stage(sizes, layout, device)
            stages.append(_stage_memory(sizes, layout, cache[key], device))
    finally:
        shutdown()
    return stages


def _trace_stage(sizes: StepSizes, layout: Layout, device: str) -> StageTrace:
    dtype, config = sizes.dtype, sizes.config
    tokens, losses = packed_on_meta(
        sizes.micro_batch_tokens, sizes.prompt_tokens, sizes.response_tokens, sizes.responses_per_prompt
    )
    losses = -(-losses // layout.cp)
    trained = {"train": config.train, "train_merger": config.vision.train_merger, "adapter": config.adapter}
    with torch.device("meta"):
        chunks = build_student(sizes.student, layout, dtype, **trained)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    counts = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in parameters) - sum(counts)
    experts = sum(p.numel() for p in parameters if p.requires_grad and not getattr(p, "allreduce", True))
    options = {"micro_batches": sizes.micro_batches, "device": device, "two_heads": sizes.has_full_divergence}
    train = training_peak(chunks, tokens, losses, **options)
    takes_images = any(chunk.vision_levels for chunk in chunks) and not any(map(has_tower, chunks))
    if any(map(has_tower, chunks)):  # every micro-batch holds as many image tokens as its prompts may have
        group = sizes.prompt_tokens + sizes.responses_per_prompt * max(sizes.response_tokens - 1, 1)
        prompts = -(-sizes.micro_batch_tokens // group)
        patches = prompts * sizes.prompt_tokens * sizes.student.vision.merge_size**2
        kept = tower_kept_bytes(chunks[0].visual, patches, recompute=layout.recompute == "full")
        train = replace(train, activations=train.activations + kept)
    linears = [linear.weight.numel() for chunk in chunks for linear in decoder_linears(chunk)]
    if not (config.adapter and config.adapter.base_bits):
        linears = []
    dequantised = dtype.itemsize * max(linears, default=0)  # one weight at a time is whole
    train = replace(train, working=train.working + dequantised)
    student = (sum(counts), experts, frozen, max(counts, default=0), takes_images, train, sum(linears))
    weights, working = [], 0.0
    for teacher in sizes.trainer_teachers:
        with torch.device("meta"):
            chunks = build_chunks(teacher.arch, layout, dtype)
        held = dtype.itemsize * sum(p.numel() for chunk in chunks for p in chunk.parameters())
        weights.append(0.0 if teacher.is_base else float(held))
        needed = max(run_micro_batch(chunk, tokens, device=device, train=False).peak for chunk in chunks)
        if layout.is_last_stage:
            needed += default_budget(torch.device(device)).tile_bytes + losses * teacher.arch.hidden * dtype.itemsize
        working = max(working, needed)
    return StageTrace(*student, tuple(weights), working)


def _stage_memory(sizes: StepSizes, layout: Layout, trace: StageTrace, device: str) -> StageMemory:
    config = sizes.config
    state = training_state_bytes(trace.trained, layout, sizes.dtype, trace.frozen, trace.experts)
    kept_state = own_state(trace.trained, trace.experts, layout)
    host = float(trace.train.host)
    if config.optimizer.offload:  # a copy of fp32 weights is there too
        copies = state_masters(kept_state, torch.bfloat16) if sizes.dtype == torch.float32 else 0.0
        host, state["optimizer"] = host + state["optimizer"] + copies, 0.0
    unpacked = 0.0
    if config.adapter and config.adapter.base_bits:
        unpacked = trace.quantised * (sizes.dtype.itemsize - QUANTISED_BYTES[config.adapter.base_bits])
        state["weights"] -= unpacked
    resident = state | {"vision": sizes.student_tower_bytes if trace.takes_images else 0.0}
    batch = float(BATCH_BYTES * sizes.tokens_per_replica)
    phases, teacher = {}, 0.0
    if sizes.objective is not None and sizes.objective.uses_self_teacher:
        resident["teacher"] = teacher = float(average_bytes(trace.trained, sizes.dtype))
    elif sizes.trainer_teachers:
        phases["teacher"] = {"working": trace.teacher_working, "batch": batch}
        towers = sizes.teacher_tower_bytes if layout.is_first_stage else (0.0,) * len(trace.teacher_weights)
        weights = [text + tower for text, tower in zip(trace.teacher_weights, towers, strict=True)]
        away = [held for held, teacher in zip(weights, sizes.trainer_teachers, strict=True) if teacher.offload]
        teacher, host = sum(weights), host + sum(away)
        if kept_here := teacher - sum(away):
            resident["teacher"] = kept_here
        if away:  # one at a time is on the device
            phases["teacher"]["teacher"] = max(away)
    kept = sizes.hidden_teacher_bytes if layout.is_last_stage else 0
    if layout.is_last_stage and (head := sizes.engine_head_bytes):
        resident["teacher"], teacher = resident.get("teacher", 0.0) + head, teacher + head
    if sizes.objective is not None and sizes.objective.reference_beta and not config.reference_is_base:
        tower = sizes.student_tower_bytes if trace.takes_images else 0.0
        reference = (trace.trained + trace.frozen) * float(sizes.dtype.itemsize) + tower
        host += reference if config.teacher_offload else 0.0
        phase = phases.setdefault("teacher", {"working": 0.0, "batch": batch})
        part = phase if config.teacher_offload else resident
        part["teacher"], teacher = part.get("teacher", 0.0) + reference, teacher + reference
    phases["train"] = {"activations": trace.train.activations, "working": trace.train.working, "batch": batch + kept}
    phases["update"] = {"working": update_bytes(kept_state, trace.largest_trained, device)}
    if config.optimizer.offload:  # a parameter's new values as they arrive; masters are made here before they move
        phases["update"] = {"working": 4.0 * trace.largest_trained}
        phases["start"] = {"optimizer": state_masters(kept_state, sizes.dtype)}
    if unpacked:  # weights are loaded whole, then quantised
        phases["start"] = phases.get("start", {}) | {"weights": unpacked}
    for phase, sampling, responses in _sampled_phases(sizes):
        resident["sampler"], phases[phase] = _sampler_memory(sizes, sampling, responses, device)
    models = state | {"teacher": teacher, "sampler": _sampler_weights(sizes)}
    return StageMemory(layout, models, resident, {name: phases[name] for name in PHASES if name in phases}, host)


# Sampler -------------------------------------------------------------------------------------------------------------


def _sampled_phases(sizes: StepSizes) -> list[tuple[str, SamplingConfig, int]]:
    """(phase, sampling settings, responses per prompt) of each phase that generates text."""
    config, phases = sizes.config, []
    if config.evaluation.every and config.evaluation.sets:
        phases.append(("evaluate", config.evaluation.sampling, config.evaluation.responses_per_problem))
    if isinstance(config, RlConfig):
        phases.append(("rollout", config.rollout, config.rollout.responses_per_prompt))
    return phases


def _sampler_weights(sizes: StepSizes) -> float:
    """A whole copy of the language model on every rank, unless nothing is sampled or other processes sample."""
    remote = (
        isinstance(sizes.config, RlConfig) and sizes.config.rollout.engine == "vllm" and sizes.config.rollout.vllm.urls
    )
    if remote or not _sampled_phases(sizes):
        return 0.0
    return float(language_model_parameters(sizes.student) * sizes.dtype.itemsize)


def _sampler_memory(
    sizes: StepSizes, sampling: SamplingConfig, responses: int, device: str
) -> tuple[float, dict[str, float]]:
    """(resident bytes, component -> bytes added while it samples) of `responses` per prompt."""
    config, arch, size = sizes.config, sizes.student, sizes.dtype.itemsize
    weights = _sampler_weights(sizes)
    if isinstance(config, RlConfig) and config.rollout.engine == "vllm":
        vllm = config.rollout.vllm
        if vllm.urls:
            return 0.0, {"KV cache": 0.0}
        weights += sizes.student_tower_bytes
        cache = vllm.kv_cache_gib * 2**30
        return (0.0, {"sampler": weights, "KV cache": cache}) if vllm.sleep else (weights + cache, {"KV cache": 0.0})
    sequences = sampling.sequences_per_call
    # Prompts are prefilled before their keys and values are repeated for every response (on a CPU: read by all).
    prefilled = -(-sequences // responses) * config.prompt.max_tokens
    cache = _kv_cache_bytes(sizes, sampling, prefilled, device) + sequences * recurrent_bytes(arch, size)
    drawing = sequences * arch.vocab * (size + SCORE_VECTORS * 4)
    ffn = arch.ffn * (arch.mixture.per_token if arch.mixture else 1)
    prefill = prefilled * ((3 * ffn + 4 * arch.hidden) * size + kv_bytes(arch, size))
    return weights + sizes.student_tower_bytes, {"KV cache": cache, "working": max(drawing, prefill - cache)}


def _kv_cache_bytes(sizes: StepSizes, sampling: SamplingConfig, prefilled: int, device: str) -> float:
    """Of transformers' sampler when its responses are longest; `prefilled`: tokens of the different prompts. The cache
    grows by copies, a layer at a time."""
    arch, sequences, new = sizes.student, sampling.sequences_per_call, sampling.max_new_tokens - 1
    token, step = kv_bytes(arch, sizes.dtype.itemsize), PreallocatedLayer.SPARE_TOKENS + 1
    copied = token * sequences / max(arch.attention_layers, 1)
    if device == "cpu":  # see SharedPromptLayer: prompts twice, and buffers of what is sampled, which begin with room
        grown = -(-max(new - SPARE_TOKENS, 0) // step)
        room = SPARE_TOKENS + grown * step
        return token * (2 * prefilled + sequences * room) + copied * (room - step if grown else 0)
    length = sizes.config.prompt.max_tokens + -(-new // step) * step
    return token * sequences * length + copied * (length - step)


def kv_bytes(arch: Architecture, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * arch.attention_layers * arch.kv_heads * arch.head_dim * itemsize


def recurrent_bytes(arch: Architecture, itemsize: int) -> int:
    """Bytes of one sequence's states in all gated delta nets: of the rule in fp32, and of the convolution."""
    if arch.delta_net is None:
        return 0
    net = arch.delta_net
    channels = 2 * net.key_heads * net.key_width + net.value_heads * net.value_width
    state = 4 * net.value_heads * net.key_width * net.value_width
    return len(net.layers) * (state + net.window * channels * itemsize)
