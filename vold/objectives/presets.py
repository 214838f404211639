"""The methods of the papers as `Objective`s; docs/methods.md has their formulas, sources and uses.

A method is added here, or composed of existing parts in a config (configs/methods): no other module knows its name.
"""

from __future__ import annotations

from dataclasses import replace

from vold.config.schema import ObjectiveConfig
from vold.objectives.advantages import ADVANTAGES, fixed_negative, group_normalised, mean_centred, smoothed
from vold.objectives.divergences import REFERENCE_DIVERGENCES, VocabularyDivergence, build_divergence
from vold.objectives.normalisers import NORMALISERS, constant, sequences
from vold.objectives.objective import Objective
from vold.objectives.ratios import ADAPTIVE, CONSTANT, GATED, RATIOS, SEQUENCE
from vold.objectives.rewards import OverlongPenalty
from vold.objectives.routing import ROUTINGS, every, failed, failed_groups
from vold.objectives.schedules import Linear, Schedule, TargetKL
from vold.objectives.self_distillation import SelfDistillation

_GRPO = Objective(group_normalised, beta=0.0)
_VOLD = Objective(group_normalised, failed)
_GSPO = {"ratio": SEQUENCE, "normaliser": sequences, "clip_eps_low": 3e-4, "clip_eps_high": 4e-4}
_KDRL = Objective(group_normalised, every, beta=5e-3, schedule=Linear(end=1e-3, step_size=5e-5), clip_eps_high=0.2)
_SDPO = Objective(
    routing=every,
    self_distillation=SelfDistillation(),
    divergence=VocabularyDivergence("jsd", alpha=0.5, top_k=100),
    beta=1.0,
    clip_eps_high=0.28,
)

PRESETS: dict[str, Objective] = {
    "grpo": _GRPO,
    "vold": _VOLD,
    "vold-unmasked": replace(_VOLD, routing=every),
    "mopd": replace(_VOLD, routing=every),  # several teachers, beside rewards
    "vold-gspo": replace(_VOLD, **_GSPO),
    "opd": Objective(routing=every, beta=1.0),
    "top-d": Objective(routing=every, beta=1.0, teacher_share=0.5),
    "uni-opd": Objective(routing=every, beta=1.0, margin=0.4, clip_eps_high=0.28),  # as the authors' scripts
    "va-opd": Objective(
        routing=every,
        divergence=VocabularyDivergence("reverse_kl"),
        normaliser=sequences,
        visual_advantage=True,
        beta=1.0,
    ),
    "grpo-reference": replace(_GRPO, normaliser=sequences, clip_eps_high=0.2, reference_beta=0.04),  # as published
    "dr-grpo": replace(_GRPO, advantage=mean_centred, normaliser=constant, clip_eps_high=0.2),
    "dapo": replace(_GRPO, clip_eps_high=0.28, overlong=OverlongPenalty()),
    "gspo": replace(_GRPO, **_GSPO),
    "dcpo": replace(
        _GRPO, advantage=smoothed, ratio=ADAPTIVE, normaliser=sequences, clip_eps_low=0.16, clip_eps_high=0.2
    ),
    "cispo": replace(_GRPO, ratio=CONSTANT, clip_eps_low=1.0, clip_eps_high=4.0),  # weights up to 5, as TRL's example
    "sapo": replace(_GRPO, ratio=GATED, normaliser=sequences),
    "fixed-negative": Objective(fixed_negative, beta=0.0),
    "kdrl": _KDRL,
    "kdrl-response": replace(_KDRL, routing=failed),
    "kdrl-group": replace(_KDRL, routing=failed_groups),
    "sdpo": _SDPO,
    "srpo": replace(
        _SDPO,
        advantage=group_normalised,
        routing=failed,
        self_distillation=SelfDistillation(confident=True),
        exclusive_terms=True,
    ),
}


def build_objective(config: ObjectiveConfig, max_response_tokens: int) -> Objective:
    """The preset, changed as the config says. max_response_tokens: the sampling limit of a response.

    Raises ValueError for an unknown name, or for numbers that do not fit each other.
    """
    objective = _choose("preset", config.preset, PRESETS)
    changes = config.model_dump(
        include={
            "beta",
            "clip_eps_low",
            "clip_eps_high",
            "kl_clamp",
            "entropy_bonus",
            "visual_advantage",
            "reference_beta",
            "teacher_share",
            "margin",
        },
        exclude_none=True,
    )
    for part, choices in _PARTS.items():
        if (name := getattr(config, part)) is not None:
            changes[part] = _choose(part, name, choices)
    if config.overlong_share is not None:
        penalty = OverlongPenalty(config.overlong_share, config.overlong_penalty)
        changes["overlong"] = penalty if config.overlong_share else None
    if config.reference_divergence is not None:
        changes["reference_divergence"] = REFERENCE_DIVERGENCES[config.reference_divergence]
    changes |= {"routing_term": config.routing_term, "max_response_tokens": max_response_tokens}
    objective = replace(objective, **changes)
    objective = replace(objective, divergence=_divergence(config, objective))
    objective = replace(objective, self_distillation=_self_distillation(config, objective))
    _check_calibration(objective)
    return replace(objective, schedule=_schedule(config, objective))


_PARTS: dict[str, dict] = {
    "advantage": ADVANTAGES,
    "ratio": RATIOS,
    "normaliser": NORMALISERS,
    "routing": ROUTINGS,
}


def _divergence(config: ObjectiveConfig, objective: Objective) -> VocabularyDivergence | None:
    divergence = objective.divergence if config.divergence is None else build_divergence(config.divergence)
    if config.top_k is None:
        return divergence
    if divergence is None:
        raise ValueError(
            "objective.top_k is of a whole distribution; set objective.divergence: reverse_kl, forward_kl or jsd"
        )
    return replace(divergence, top_k=config.top_k)


def _check_calibration(objective: Objective) -> None:
    key = "margin" if objective.margin is not None else "teacher_share"
    if objective.margin is None and objective.teacher_share == 1.0:
        return
    if not objective.needs_teacher or objective.divergence is not None:
        raise ValueError(
            f"objective.{key} is about a teacher's log-probs of sampled tokens; set objective.divergence=k2 and a "
            "beta, or leave it out"
        )


def _self_distillation(config: ObjectiveConfig, objective: Objective) -> SelfDistillation | None:
    settings = {"rate": config.average_rate, "feedback": config.feedback}
    changes = {key: value for key, value in settings.items() if value is not None}
    if not changes:
        return objective.self_distillation
    if objective.self_distillation is None:
        raise ValueError(
            "objective.average_rate and objective.feedback are of a student that teaches itself and "
            f"objective.preset = {config.preset!r} does not; choose sdpo or srpo, or leave them out"
        )
    return replace(objective.self_distillation, **changes)


def _schedule(config: ObjectiveConfig, objective: Objective) -> Schedule:
    if config.target_kl is not None:
        if not objective.beta:
            raise ValueError(
                "objective.target_kl steers beta in proportion, from objective.beta = 0 nowhere; set a beta"
            )
        return TargetKL(config.target_kl)
    if config.beta_end is not None and config.beta_step is not None:
        return Linear(config.beta_end, config.beta_step)
    return objective.schedule


def _choose(key: str, name: str, choices: dict):
    if name not in choices:
        raise ValueError(f"objective.{key} = {name!r} is unknown; choose one of {', '.join(choices)}")
    return choices[name]
