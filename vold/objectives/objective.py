"""An algorithm is a value: which advantage, which routing, which numbers. The loop never learns its name.

Per token (VOLD Eq. 6; m: response mask, Z: response tokens of the whole step over all ranks):

    L = (1/Z) sum m * ( L_pg + beta * route(r) * L_kl )
    L_pg = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   L_kl = 1/2 (logp - logp_teacher)^2   (k2)

k2 as a *loss* has the gradient of KL(student || teacher) on the student's own samples; the paper prints
KL(teacher || student) and calls it reverse KL: we follow the estimator, not the print.
`Objective.weigh` folds Z, beta and routing into two numbers per response; the kernel sees only those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vold.config.schema import ObjectiveConfig
from vold.objectives import advantages, routing
from vold.records import Group, Sample


@dataclass(frozen=True)
class Objective:
    """advantage: rewards of a group -> advantages; route: 1.0 for a right answer, else 0.0 -> share of the KL term;
    beta: its weight."""

    advantage: Callable[[Sequence[float]], list[float]]
    route: Callable[[float], float]
    beta: float = 1e-3
    clip_low: float = 0.2
    clip_high: float = 0.3

    @property
    def needs_teacher(self) -> bool:
        return self.beta > 0.0 and self.route is not routing.nowhere

    def weigh(self, groups: Sequence[Group]) -> list[Sample]:
        """One Sample per graded response, in order; responses whose grader broke are left out of group and loss.

        `groups` are those of the whole step. The normaliser is their response-token count, shared by both terms,
        counted before any micro-batch exists, so that no split of the batch can change the gradient.
        """
        samples = [sample for group in groups for sample in self._of_group(group)]
        scale = 1.0 / max(_tokens(samples), 1)
        return [_scaled(sample, scale) for sample in samples]

    def distils(self, group: Group) -> list[bool]:
        """Of each response of a graded group, whether the teacher's log-probs will be asked for."""
        samples = iter(self.weigh([group]))
        return [reward is not None and next(samples).kl_weight != 0.0 for reward in group.rewards]

    def informs(self, group: Group) -> bool:
        """Whether a group has a gradient at all. (Under VOLD one that failed altogether has: its KL term.)"""
        return any(sample.pg_weight or sample.kl_weight for sample in self.weigh([group]))

    def _of_group(self, group: Group) -> list[Sample]:
        judged = zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        graded = [response for response in judged if response[2] is not None]
        advantages_G = self.advantage([reward for _, _, reward in graded])
        return [
            Sample(
                prompt=group.prompt,
                response_ids=rollout.response_ids,
                advantage=advantage,
                pg_weight=float(advantage != 0.0),
                kl_weight=self.beta * self.route(float(verdict.outcome == "correct")),
                logp_rollout=rollout.logp_rollout,
                logp_teacher=rollout.logp_teacher,
            )
            for (rollout, verdict, _), advantage in zip(graded, advantages_G, strict=True)
        ]


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.response_ids) for sample in samples)


def _scaled(sample: Sample, scale: float) -> Sample:
    return replace(sample, pg_weight=sample.pg_weight * scale, kl_weight=sample.kl_weight * scale)


PRESETS: dict[str, Objective] = {
    "grpo": Objective(advantages.group_normalised, routing.nowhere, beta=0.0),
    "vold": Objective(advantages.group_normalised, routing.failed),
    "vold-unmasked": Objective(advantages.group_normalised, routing.every),
    "opd": Objective(advantages.none, routing.every),
}


def build_objective(config: ObjectiveConfig) -> Objective:
    """The preset with the config's numbers. Raises ValueError for an unknown preset."""
    if config.preset not in PRESETS:
        raise ValueError(f"objective.preset = {config.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    numbers = config.model_dump(exclude={"preset", "visual_advantage"})
    return replace(PRESETS[config.preset], **numbers)


def likelihood(responses: Sequence[Sample]) -> list[Sample]:
    """Stage 1's weights (VOLD Eq. 4): at ratio 1 and A = 1 the policy gradient *is* the gradient of the mean
    negative log-likelihood, so SFT runs through the same fused loss. `responses` are those of the whole step."""
    weight = 1.0 / max(_tokens(responses), 1)
    return [replace(sample, advantage=1.0, pg_weight=weight, kl_weight=0.0) for sample in responses]
