"""The papers' methods, each a value; docs/methods.md has their formulas, sources and uses.

A method is added here, or out of existing parts in a config (configs/methods): nothing else knows its name.
"""

from __future__ import annotations

from dataclasses import replace

from vold.config.schema import ObjectiveConfig
from vold.objectives.advantages import ADVANTAGES, group_normalised, mean_centred, smoothed
from vold.objectives.divergences import FullDivergence, build_divergence
from vold.objectives.normalisers import NORMALISERS, constant, sequences
from vold.objectives.objective import Objective
from vold.objectives.ratios import ADAPTIVE, RATIOS, SEQUENCE
from vold.objectives.rewards import OverlongPenalty
from vold.objectives.routing import ROUTES, every, failed, failed_groups
from vold.objectives.schedules import Linear, TargetKL
from vold.objectives.self_distillation import SelfTeaching

_GRPO = Objective(group_normalised, beta=0.0)
_VOLD = Objective(group_normalised, failed)
_GSPO = {"ratio": SEQUENCE, "normaliser": sequences, "clip_eps_low": 3e-4, "clip_eps_high": 4e-4}
_KDRL = Objective(group_normalised, every, beta=5e-3, schedule=Linear(end=1e-3, by=5e-5), clip_eps_high=0.2)
_SDPO = Objective(
    route=every,
    self_teaching=SelfTeaching(),
    divergence=FullDivergence("jsd", alpha=0.5, top_k=100),
    beta=1.0,
    clip_eps_high=0.28,
)

PRESETS: dict[str, Objective] = {
    "grpo": _GRPO,
    "vold": _VOLD,
    "vold-unmasked": replace(_VOLD, route=every),
    "vold-gspo": replace(_VOLD, **_GSPO),
    "opd": Objective(route=every, beta=1.0),
    "va-opd": Objective(
        route=every, divergence=FullDivergence("reverse_kl"), normaliser=sequences, visual_advantage=True, beta=1.0
    ),
    "dr-grpo": replace(_GRPO, advantage=mean_centred, normaliser=constant, clip_eps_high=0.2),
    "dapo": replace(_GRPO, clip_eps_high=0.28, overlong=OverlongPenalty()),
    "gspo": replace(_GRPO, **_GSPO),
    "dcpo": replace(
        _GRPO, advantage=smoothed, ratio=ADAPTIVE, normaliser=sequences, clip_eps_low=0.16, clip_eps_high=0.2
    ),
    "kdrl": _KDRL,
    "kdrl-response": replace(_KDRL, route=failed),
    "kdrl-group": replace(_KDRL, route=failed_groups),
    "sdpo": _SDPO,
    "srpo": replace(
        _SDPO,
        advantage=group_normalised,
        route=failed,
        self_teaching=SelfTeaching(confident=True),
        either=True,
    ),
}


def build_objective(config: ObjectiveConfig, longest: int) -> Objective:
    """The preset with what the config changes of it. longest: tokens of the longest response that is sampled.
    Raises ValueError for an unknown name, or for numbers that do not fit each other."""
    objective = replace(_named("preset", config.preset, PRESETS), longest=longest)
    parts = {"advantage": ADVANTAGES, "ratio": RATIOS, "normaliser": NORMALISERS, "routing": ROUTES}
    for key, choices in parts.items():
        if (name := getattr(config, key)) is not None:
            field = "route" if key == "routing" else key
            objective = replace(objective, **{field: _named(key, name, choices)})
    if config.divergence is not None:
        objective = replace(objective, divergence=build_divergence(config.divergence))
    if config.top_k is not None:
        if objective.divergence is None:
            raise ValueError(
                "objective.top_k is of a whole distribution; set objective.divergence: reverse_kl, forward_kl or jsd"
            )
        objective = replace(objective, divergence=replace(objective.divergence, top_k=config.top_k))
    numbers = config.model_dump(
        include={"beta", "clip_eps_low", "clip_eps_high", "kl_clamp", "entropy_bonus", "visual_advantage"}
    )
    objective = replace(objective, **{key: value for key, value in numbers.items() if value is not None})
    own = {"rate": config.average_rate, "feedback": config.feedback}
    if own := {key: value for key, value in own.items() if value is not None}:
        if objective.self_teaching is None:
            raise ValueError(
                "objective.average_rate and objective.feedback are of a student that teaches itself and "
                f"objective.preset = {config.preset!r} does not; choose sdpo or srpo, or leave them out"
            )
        objective = replace(objective, self_teaching=replace(objective.self_teaching, **own))
    if config.target_kl is not None:
        objective = replace(objective, schedule=TargetKL(config.target_kl))
    elif config.beta_end is not None:
        objective = replace(objective, schedule=Linear(config.beta_end, config.beta_step))
    if config.overlong_share is not None:
        penalty = OverlongPenalty(config.overlong_share, config.overlong_penalty)
        objective = replace(objective, overlong=penalty if config.overlong_share else None)
    if config.target_kl is not None and not objective.beta:
        raise ValueError("objective.target_kl steers beta in proportion, from objective.beta = 0 nowhere; set a beta")
    return objective


def _named(key: str, name: str, choices: dict):
    if name not in choices:
        raise ValueError(f"objective.{key} = {name!r} is unknown; choose one of {', '.join(choices)}")
    return choices[name]
