"""An algorithm is a value: advantage, ratio, routing, normaliser, schedule and numbers. The loop never learns its name.

Per token of response i (VOLD Eq. 6; m: response mask, Z: the normaliser, over the whole update and all ranks):

    L = sum m / Z * ( L_pg - entropy_bonus * entropy + beta * route(r) * L_kl )
    L_pg = -min(rho A, clip(rho, 1 - clip_eps_low, 1 + clip_eps_high) A),   L_kl = 1/2 (logp - logp_teacher)^2   (k2)

k2 as a *loss* has the gradient of KL(student || teacher) on the student's own samples; the paper prints
KL(teacher || student) and calls it reverse KL: we follow the estimator, not the print.
`Objective.weigh` folds Z, beta and routing into two numbers per response; the kernel sees only those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vold.objectives import advantages, normalisers, ratios, routing, schedules
from vold.objectives.divergences import FullDivergence
from vold.objectives.rewards import OverlongPenalty
from vold.objectives.self_distillation import SelfTeaching
from vold.types import Group, MicroBatch, Sample
from vold_kernels import PolicyTerms


@dataclass(frozen=True)
class Objective:
    """What each part may be: see its module. `longest`: tokens of the longest response that is sampled."""

    advantage: advantages.Advantage = advantages.none
    route: routing.Route = routing.nowhere
    ratio: ratios.Ratio = ratios.TOKEN
    normaliser: normalisers.Normaliser = normalisers.tokens
    divergence: FullDivergence | None = None  # None: k2 of the sampled tokens
    schedule: schedules.Schedule = schedules.constant
    overlong: OverlongPenalty | None = None
    self_teaching: SelfTeaching | None = None  # given: the student's own average is the teacher
    visual_advantage: bool = False  # KL weighs most where the teacher's opinion hangs on an image's detail
    either: bool = False  # a response is distilled or has a policy gradient, never both
    beta: float = 1e-3
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.3
    kl_clamp: float = math.inf  # nats; the pull towards the teacher of a token further away than this grows no more
    entropy_bonus: float = 0.0
    longest: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Another model's scores."""
        return self._distils and self.self_teaching is None

    @property
    def teaches_itself(self) -> bool:
        return self._distils and self.self_teaching is not None

    @property
    def _distils(self) -> bool:
        return self.beta > 0.0 and self.route is not routing.nowhere

    def at(self, step: int, last: Mapping[str, float]) -> Objective:
        """This objective at 0-based `step`, with that step's beta. `last`: the metrics of the step before, or {}."""
        return replace(self, beta=self.schedule(self.beta, step, last))

    def metrics(self) -> dict[str, float]:
        """What of it changes from step to step; `at` reads it back."""
        return {"beta": self.beta} if self._distils else {}

    # -- rewards -> weights ----------------------------------------------------------------------------------------

    def assign_token_weights(self, groups: Sequence[Group], *, minibatches: int = 1) -> list[Sample]:
        """One Sample per graded response, in order; responses whose grader broke are left out of group and loss.

        `groups` are those of the whole step. Each of its `minibatches` is an update of its own, and the normaliser is
        counted over it, shared by all terms.
        """
        samples: list[Sample] = []
        for number in range(minibatches):
            part = groups[len(groups) * number // minibatches : len(groups) * (number + 1) // minibatches]
            found = [sample for group in part for sample in self._of_group(group)]
            weights_B = self.normaliser([len(sample.response_ids) for sample in found], self.longest)
            samples += [_scaled(s, weight, number) for s, weight in zip(found, weights_B, strict=True)]
        return samples

    def needs_teacher_logprobs(self, group: Group) -> list[bool]:
        """Of each response of a graded group, whether the teacher's log-probs will be asked for."""
        samples = iter(self.assign_token_weights([group]))
        return [reward is not None and next(samples).kl_weight != 0.0 for reward in group.rewards]

    def has_gradient(self, group: Group) -> bool:
        """Whether a group has a gradient at all. (Under VOLD one that failed altogether has: its KL term.)"""
        return any(sample.pg_weight or sample.kl_weight for sample in self.assign_token_weights([group]))

    def _of_group(self, group: Group) -> list[Sample]:
        judged = zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        graded = [response for response in judged if response[2] is not None]
        right_G = [float(verdict.outcome == "correct") for _, verdict, _ in graded]
        advantages_G = self.advantage([reward - self._penalty(rollout) for rollout, _, reward in graded], group.earlier)
        shares_G, hints_G = self.route(right_G), [None] * len(graded)
        if self.self_teaching:
            hints_G = self.self_teaching.hints([(rollout, verdict) for rollout, verdict, _ in graded])
            shares_G = [share * (hint is not None) for share, hint in zip(shares_G, hints_G, strict=True)]
        parts = zip(graded, advantages_G, shares_G, hints_G, strict=True)
        return [
            Sample(
                prompt=group.prompt,
                response_ids=rollout.response_ids,
                advantage=advantage,
                pg_weight=float(advantage != 0.0 or self.entropy_bonus != 0.0) * (1.0 - share if self.either else 1.0),
                kl_weight=self.beta * share,
                logp_rollout=rollout.logp_rollout,
                logp_teacher=rollout.logp_teacher,
                hint=hint,
            )
            for (rollout, *_), advantage, share, hint in parts
        ]

    def _penalty(self, rollout) -> float:
        return self.overlong(len(rollout.response_ids), self.longest) if self.overlong else 0.0

    # -- the trainer's part ----------------------------------------------------------------------------------------

    def terms(self, batch: MicroBatch) -> PolicyTerms:
        """What the fused policy loss reads of each of the N tokens. A full divergence is not its part."""
        sampled = self.divergence is None
        low_N = high_N = None
        if self.ratio.bounds is not None and batch.logp_old_N is not None:
            low_N, high_N = self.ratio.bounds(batch.logp_old_N, self.clip_eps_low, self.clip_eps_high)
        return PolicyTerms(
            batch.logp_old_N,
            batch.logp_teacher_N if sampled else None,
            batch.advantage_N,
            batch.pg_weight_N,
            batch.kl_weight_N if sampled else torch.zeros_like(batch.kl_weight_N),
            sequence_N=batch.sequence_N if self.ratio.couples_tokens else None,
            ratio_low_N=low_N,
            ratio_high_N=high_N,
        )

    def numbers(self) -> dict[str, float]:
        """The fused loss's keywords."""
        return {
            "clip_eps_low": self.clip_eps_low,
            "clip_eps_high": self.clip_eps_high,
            "entropy_bonus": self.entropy_bonus,
            "kl_clamp": self.kl_clamp,
        }

    def divergence_options(self) -> dict:
        """`linear_kl`'s keywords."""
        full = self.divergence
        return {"divergence": full.kind, "alpha": full.alpha, "top_k": full.top_k}


def _scaled(sample: Sample, scale: float, minibatch: int) -> Sample:
    return replace(sample, pg_weight=sample.pg_weight * scale, kl_weight=sample.kl_weight * scale, minibatch=minibatch)


def minibatches(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each update, in order: all of them, those of other updates without weight, so that a sample keeps
    its place in the list."""
    numbers = sorted({sample.minibatch for sample in samples}) or [0]
    return [[s if s.minibatch == number else _scaled(s, 0.0, s.minibatch) for s in samples] for number in numbers]


def likelihood(responses: Sequence[Sample]) -> list[Sample]:
    """Stage 1's weights (VOLD Eq. 4): at ratio 1 and A = 1 the policy gradient *is* the gradient of the mean
    negative log-likelihood, so SFT runs through the same fused loss. `responses` are those of the whole step."""
    lengths = [len(sample.response_ids) for sample in responses]
    weights = normalisers.tokens(lengths, 0)
    return [
        replace(sample, advantage=1.0, pg_weight=weight, kl_weight=0.0)
        for sample, weight in zip(responses, weights, strict=True)
    ]
