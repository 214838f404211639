"""Checks of a stage's config that need no model, for the run itself, `vold check` and `vold plan`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vold.config.schema import AdapterConfig, RlConfig, SftConfig, TrainConfig
from vold.models.adapters import VISUAL
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import short_name
from vold.models.tokenizer import check_checkpoint, check_pair
from vold.objectives import Objective
from vold.rollout.vllm.adapters import RANKS
from vold.types import Prompt


def check_rl_config(config: RlConfig, objective: Objective) -> None:
    """Raise ValueError for mistakes that are visible before any model is loaded."""
    teacher_engine = config.teacher_engine if objective.needs_teacher else ""
    if objective.needs_teacher and config.teacher is None and not config.teachers:
        raise ValueError(f"objective.preset = {config.objective.preset!r} needs a teacher; set teacher: PATH")
    _check_reference(config, objective)
    _check_views(config, objective, teacher_engine)
    _check_lag(config, teacher_engine)
    if config.synced_adapter is not None:
        _check_synced_adapter(config, config.synced_adapter)
    _check_router_replay(config)
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    if longest > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold prompt.max_tokens + rollout.max_new_tokens "
            f"= {longest}; raise it or lower those"
        )


def _check_views(config: RlConfig, objective: Objective, teacher_engine: str) -> None:
    if config.teachers and objective.needs_teacher and objective.visual_advantage:
        raise ValueError("objective.visual_advantage is of one teacher; set teacher: PATH instead of teachers")
    views = [config.teacher_view, *(several.view for several in config.teachers.values())]
    if any(view.degraded_column for view in views) and not objective.visual_advantage:
        raise ValueError(
            "a teacher view's degraded_column is the second reading of objective.visual_advantage; leave it out, or "
            "set that"
        )
    if objective.visual_advantage and teacher_engine in ("vllm", "openai"):
        raise ValueError(
            "objective.visual_advantage reads each response twice, with degraded images, and teacher_engine = "
            f"{teacher_engine!r} does not; set teacher_engine=trainer"
        )


def _check_router_replay(config: RlConfig) -> None:
    mode, key = config.rollout.router_replay, f"rollout.router_replay = {config.rollout.router_replay}"
    if mode is None:
        return
    arch = Architecture.from_pretrained(config.student)
    if arch.mixture is None:
        raise ValueError(f"{key} is of a mixture of experts and student = {config.student} has none; leave it out")
    if mode == "R2" and config.minibatches == 1:
        raise ValueError(f"{key} replays the choices before a step's first update to the others: set minibatches > 1")
    if mode == "R3" and config.rollout.engine == "vllm":
        raise ValueError(
            f"{key} needs the sampler's choices: vLLM 0.32 returns them from its second model runner alone, in which "
            "log-probs are not those of the policy; set rollout.engine=transformers, or router_replay R2 or null"
        )


def _check_lag(config: RlConfig, teacher_engine: str) -> None:
    """Raise ValueError for what does not go together with sampling ahead, or over weight syncs."""
    lag, reason = config.rollout.lag, ""
    engines = [
        ("rollout.vllm", config.rollout.engine, config.rollout.vllm),
        ("teacher_vllm", teacher_engine, config.teacher_vllm),
    ]
    engines += [(f"teachers.{name}.vllm", several.engine, several.vllm) for name, several in config.teachers.items()]
    for key, engine, settings in engines:
        if lag and engine == "vllm" and not settings.urls:
            raise ValueError(
                f"rollout.lag = {lag} needs engines that do not share the trainer's GPU: start them "
                f"with `vold serve` and name them in {key}.urls, or set rollout.lag=0"
            )
    if lag < 2:
        return
    if config.rollout.dynamic_sampling is not None:
        reason = "does not sample in the place of groups that are dropped: leave rollout.dynamic_sampling out"
    elif config.synced_adapter is not None:
        reason = "needs whole weights, which running requests go on with: set adapter.sync=merged"
    elif config.rollout.engine == "vllm" and trains_tower(config):
        reason = "would use images that engines have read with an older vision tower: train the language model alone"
    if reason:
        raise ValueError(f"rollout.lag = {lag} {reason}, or set rollout.lag=1")


def _check_synced_adapter(config: RlConfig, adapter: AdapterConfig) -> None:
    reason = ""
    if config.rollout.engine != "vllm":
        reason = f"needs rollout.engine=vllm, not {config.rollout.engine}"
    elif adapter.rank > RANKS[-1]:
        reason = f"and adapter.rank = {adapter.rank}: vLLM takes at most {RANKS[-1]}"
    elif visual := [target for target in adapter.targets if target in VISUAL]:
        reason = f"and adapter.targets has {visual[0]}, which vLLM leaves out"
    elif config.train or config.vision.train_merger:
        reason = "leaves out the weights that train or vision.train_merger names"
    elif adapter.base_bits is not None:
        reason = f"and adapter.base_bits = {adapter.base_bits}: the engine's base would have other weights"
    if reason:
        raise ValueError(f"adapter.sync = adapter {reason}; set adapter.sync=merged")


def _check_reference(config: RlConfig, objective: Objective) -> None:
    if config.reference is None:
        return
    if not objective.reference_beta:
        raise ValueError(
            f"reference = {config.reference} is not read with objective.reference_beta = 0; set that, or leave it out"
        )
    shared_vocab_size(config.student, config.reference)
    sees, reads = (bool(Architecture.from_pretrained(path).vision) for path in (config.reference, config.student))
    if reads and not sees:
        raise ValueError(
            f"reference = {config.reference} reads text only and the student images too; choose a model that the "
            "student started from"
        )


def check_sft_config(config: SftConfig) -> None:
    """Raise ValueError for mistakes that are visible before any model is loaded."""
    if config.adapter is not None and config.adapter.sync != "merged":
        raise ValueError("adapter.sync = adapter is for vLLM in stage 2; sft evaluates merged weights: leave it out")
    if config.max_tokens > config.microbatch_tokens:
        raise ValueError(
            f"microbatch_tokens = {config.microbatch_tokens} cannot hold max_tokens = {config.max_tokens}; raise it"
        )


def trains_tower(config: TrainConfig) -> bool:
    """Whether weights of the vision tower, or of its mergers, are trained."""
    return config.vision.train_merger or any(_visual_weights(config))


def _visual_weights(config: TrainConfig) -> tuple[list[str], list[str]]:
    """(patterns of `train`, targets of the adapter) that name some."""
    named = [p for p in config.train or () if short_name(p).startswith("visual") or short_name(p) == "*"]
    adapted = [target for target in config.adapter.targets if target in VISUAL] if config.adapter else []
    return named, adapted


def check_trained_vision(config: TrainConfig, prompts: Iterable[Prompt]) -> None:
    """Raise ValueError for a vision tower that no image would train: weight decay alone would change it."""
    named, adapted = _visual_weights(config)
    if not trains_tower(config) or any(prompt.images for prompt in prompts):
        return
    if adapted:
        raise ValueError(f"adapter.targets has {adapted[0]}, but no training prompt has an image; leave it out")
    if config.vision.train_merger:
        raise ValueError("vision.train_merger = true, but no training prompt has an image; set it to false")
    raise ValueError(f"train takes {named[0]!r}, but no training prompt has an image; leave it out")


def shared_vocab_size(student: Path, teacher: Path | None, *, served: bool = False) -> int:
    """The bound of the ids that a student shares with its teacher, or of its own where it has none (see check_pair)."""
    if teacher is None:
        return check_checkpoint(student)
    return check_pair(student, teacher, served=served).shared_vocab_size
