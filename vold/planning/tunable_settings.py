"""Search for the cheapest change of settings with which a config fits a GPU."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vold.config.schema import EvaluationConfig, RlConfig, SftConfig, Strict
from vold.planning.gpu_specs import GpuSpec
from vold.planning.memory_table import fullest
from vold.planning.stage_memory import TraceCache, stage_memories
from vold.planning.step_sizes import StepSizes

MAX_TRIES = 400
RECOMPUTE_MODES = ("none", "swiglu", "selective", "full")


@dataclass(frozen=True)
class TunableSetting:
    """A config key that trades time for memory.

    levels: its values from the config's own on, each needing less memory. cost: of one more level, in the order in
    which a person would try them.
    """

    key: str
    levels: tuple
    cost: int


def propose_settings(sizes: StepSizes, spec: GpuSpec, cache: TraceCache) -> tuple[list[str], float] | None:
    """(overrides, peak bytes) of the cheapest change that fits the GPU; None when none of MAX_TRIES does."""
    settings = tunable_settings(sizes)
    for levels in itertools.islice(levels_by_cost(settings), 1, MAX_TRIES):
        pairs = zip(settings, levels, strict=True)
        overrides = {setting.key: setting.levels[level] for setting, level in pairs if level}
        if overrides.get("parallel.tp", 1) > 1 and not sizes.config.parallel.sp:
            overrides["parallel.sp"] = True
        candidate = replace(sizes, config=with_overrides(sizes.config, overrides))
        try:
            peak = fullest(stage_memories(candidate, "cuda", cache)).peak
        except ValueError:  # the layout does not divide heads, layers or the processes
            continue
        if peak <= spec.usable_memory:
            return [f"{key}={_yaml(value)}" for key, value in overrides.items()], peak
    return None


def tunable_settings(sizes: StepSizes) -> list[TunableSetting]:
    config, parallel = sizes.config, sizes.config.parallel
    longest = config.max_tokens if isinstance(config, SftConfig) else sizes.prompt_tokens + sizes.response_tokens
    settings = [
        _switch("parallel.distributed_optimizer", parallel.distributed_optimizer, 1),
        TunableSetting("parallel.recompute", RECOMPUTE_MODES[RECOMPUTE_MODES.index(parallel.recompute) :], 4),
        TunableSetting("microbatch_tokens", _halvings(config.microbatch_tokens, longest), 3),
        TunableSetting("parallel.tp", _doublings(parallel.tp, sizes.processes), 8),
        TunableSetting("parallel.pp", _doublings(parallel.pp, sizes.processes), 10),
        TunableSetting("parallel.cp", _doublings(parallel.cp, sizes.processes), 12),
        _switch("optimizer.offload", config.optimizer.offload, 6),
        _switch("parallel.offload_activations", parallel.offload_activations, 7),
        *_evaluation_settings(config.evaluation),
    ]
    if any(model and model.mixture for model in (sizes.student, *(t.arch for t in sizes.trainer_teachers))):
        settings.append(TunableSetting("parallel.ep", _doublings(parallel.ep, sizes.processes // parallel.pp), 2))
    if isinstance(config, RlConfig):
        if sizes.teacher is not None and config.teacher is not None:
            settings.append(_switch("teacher_offload", config.teacher_offload, 2))
        if config.rollout.engine == "transformers":
            settings.append(_sequences("rollout.sequences_per_call", config.rollout.sequences_per_call))
        elif not config.rollout.vllm.urls:
            settings.append(_switch("rollout.vllm.sleep", config.rollout.vllm.sleep, 2))
    return settings


def _evaluation_settings(config: EvaluationConfig) -> list[TunableSetting]:
    if not (config.every and config.sets):
        return []
    return [_sequences("evaluation.sampling.sequences_per_call", config.sampling.sequences_per_call)]


def _switch(key: str, value: bool, cost: int) -> TunableSetting:
    return TunableSetting(key, (False, True)[value:], cost)


def _sequences(key: str, value: int) -> TunableSetting:
    return TunableSetting(key, _halvings(value, 4), 2)


def _halvings(value: int, least: int) -> tuple[int, ...]:
    values = [value]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return tuple(values[:5])


def _doublings(value: int, most: int) -> tuple[int, ...]:
    return tuple(value * 2**n for n in range(4) if value * 2**n <= most)


def levels_by_cost(settings: Sequence[TunableSetting]) -> Iterator[tuple[int, ...]]:
    """A level of every setting, all combinations: the config's own first, then by rising cost."""
    start = (0,) * len(settings)
    heap, seen = [(0, start)], {start}
    while heap:
        cost, levels = heapq.heappop(heap)
        yield levels
        for index, setting in enumerate(settings):
            raised = (*levels[:index], levels[index] + 1, *levels[index + 1 :])
            if raised[index] < len(setting.levels) and raised not in seen:
                seen.add(raised)
                heapq.heappush(heap, (cost + setting.cost, raised))


def with_overrides(config: Strict, overrides: Mapping[str, object]) -> Strict:
    """A copy of the config with some dotted keys set."""
    for key, value in overrides.items():
        name, _, below = key.partition(".")
        section = with_overrides(getattr(config, name), {below: value}) if below else value
        config = config.model_copy(update={name: section})
    return config


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
