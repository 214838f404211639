"""An algorithm as a value: advantage, routing, ratio, normaliser, divergence, schedule and numbers.

Per token of response i (VOLD Eq. 6; m: response mask, Z: the normaliser, over the whole update and all ranks):

    L = sum m / Z * ( L_pg - entropy_bonus * entropy + beta * routing(r) * L_kl )
    L_pg = -min(rho A, clip(rho, 1 - clip_eps_low, 1 + clip_eps_high) A),   L_kl = 1/2 (logp - logp_teacher)^2   (k2)

A frozen reference adds reference_beta * L_ref for every response, L_ref = exp(x) - 1 - x with x = logp_reference - logp
(k3), or a divergence of whole distributions.

k2 as a *loss* has the gradient of KL(student || teacher) on the student's own samples; the paper prints
KL(teacher || student) and calls it reverse KL: we follow the estimator, not the print.
`Objective.assign_token_weights` folds Z, beta and routing into numbers per response, `pg_weight`, `kl_weight` and
`reference_weight`: the trainer and the kernel read those and never the method's name. G: responses per prompt, B:
responses of one update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from vold.objectives import advantages, normalisers, ratios, schedules
from vold.objectives.divergences import VocabularyDivergence
from vold.objectives.rewards import OverlongPenalty
from vold.objectives.routing import Routing, every, failed, failed_groups, nowhere
from vold.objectives.self_distillation import SelfDistillation, feedback_on
from vold.types import Group, MicroBatch, Rollout, Sample
from vold_kernels import PolicyTerms


@dataclass(frozen=True)
class Objective:
    """A training method. The choices for each part are in the module of its type.

    routing_term          the reward's term that routing and self-distillation read as success
    divergence            between the whole distributions of student and teacher; None: k2 of the sampled tokens
    self_distillation     set: the moving average of the student is the teacher (SDPO, SRPO)
    visual_advantage      scale each KL weight by how much the image's detail changes the teacher's log-prob (VA-OPD)
    exclusive_terms       a response with a KL term has no policy gradient (SRPO)
    beta                  weight of the KL term; at the first step, where `schedule` changes it
    reference_beta        weight of the KL term to a frozen reference, of every response; 0: there is none
    reference_divergence  between the whole distributions of student and reference; None: k3 of the sampled tokens
    teacher_share         of the teacher in a mixture with the policy that sampled, which is k2's target (TOP-D)
    margin                nats by which log p_T - log p_S of right responses should exceed that of wrong ones (Uni-OPD)
    clip_eps_low, clip_eps_high   the ratio is clipped to [1 - clip_eps_low, 1 + clip_eps_high]
    kl_clamp              nats of |logp - logp_teacher| beyond which the gradient of the KL term no longer grows
    entropy_bonus         weight of the policy's entropy, subtracted from the loss
    max_response_tokens   the sampling limit of a response
    """

    advantage: advantages.Advantage = advantages.none
    routing: Routing = nowhere
    routing_term: str = "accuracy"
    ratio: ratios.Ratio = ratios.TOKEN
    normaliser: normalisers.Normaliser = normalisers.tokens
    divergence: VocabularyDivergence | None = None
    schedule: schedules.Schedule = schedules.constant
    overlong: OverlongPenalty | None = None
    self_distillation: SelfDistillation | None = None
    visual_advantage: bool | Literal["absolute"] = False
    exclusive_terms: bool = False
    beta: float = 1e-3
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.3
    kl_clamp: float = math.inf
    entropy_bonus: float = 0.0
    max_response_tokens: int = 0
    reference_beta: float = 0.0
    reference_divergence: VocabularyDivergence | None = None
    teacher_share: float = 1.0
    margin: float | None = None

    @property
    def needs_teacher(self) -> bool:
        """The KL term needs another model's log-probabilities."""
        return self._has_kl_term and self.self_distillation is None

    @property
    def uses_self_teacher(self) -> bool:
        """The KL term needs the moving average of the student."""
        return self._has_kl_term and self.self_distillation is not None

    @property
    def routed_by(self) -> str | None:
        """The reward's term that decides where the KL term applies, and which sibling is right; None where all
        responses are alike."""
        by_success = self.routing in (failed, failed_groups) or self.self_distillation is not None
        by_success = by_success or self.margin is not None
        return self.routing_term if self._has_kl_term and by_success else None

    @property
    def needs_reward(self) -> bool:
        """The weights depend on rewards or right answers: not so where every response is distilled and no more."""
        routed_by_right = self._has_kl_term and (self.routing is not every or self.margin is not None)
        return self.advantage not in advantages.WITHOUT_REWARD or routed_by_right or self.uses_self_teacher

    @property
    def calibrates(self) -> bool:
        """The teacher's log-probs are changed before they are a loss (see vold.objectives.calibration)."""
        return self.needs_teacher and (self.teacher_share < 1.0 or self.margin is not None)

    @property
    def _has_kl_term(self) -> bool:
        return self.beta > 0.0 and self.routing is not nowhere

    def at_step(self, step: int, last: Mapping[str, float]) -> Objective:
        """The same objective with the beta of 0-based `step`. last: metrics of the step before, {} at the first."""
        return replace(self, beta=self.schedule(self.beta, step, last))

    def metrics(self) -> dict[str, float]:
        """The numbers that change from step to step, for metrics.jsonl; `at_step` reads them back."""
        return {"beta": self.beta} if self._has_kl_term else {}

    # -- rewards -> weights ----------------------------------------------------------------------------------------

    def assign_token_weights(self, groups: Sequence[Group], *, minibatches: int = 1) -> list[Sample]:
        """One Sample per graded response, in order; responses whose grader broke are left out of group and loss.

        groups: of the whole step, on all ranks. minibatches: updates that the groups are divided among; each has its
        own normaliser, shared by all terms of the loss.
        """
        samples: list[Sample] = []
        for number in range(minibatches):
            part = groups[len(groups) * number // minibatches : len(groups) * (number + 1) // minibatches]
            update_B = [sample for group in part for sample in self._group_samples(group)]
            lengths_B = [len(sample.response_ids) for sample in update_B]
            weights_B = self.normaliser(lengths_B, self.max_response_tokens)
            samples += [_scaled(s, weight, number) for s, weight in zip(update_B, weights_B, strict=True)]
        return samples

    def needs_teacher_logprobs(self, group: Group) -> list[bool]:
        """[G] True where a response of the group gets a KL term."""
        samples = iter(self.assign_token_weights([group]))
        return [reward is not None and next(samples).kl_weight != 0.0 for reward in group.rewards]

    def has_gradient(self, group: Group) -> bool:
        """True if a response of the group gets a weight. (Under VOLD one without a right answer does: its KL term.)
        That of a reference, which every response gets, does not count."""
        return any(sample.pg_weight or sample.kl_weight for sample in self.assign_token_weights([group]))

    def _group_samples(self, group: Group) -> list[Sample]:
        """The group's graded responses, with weights that the normaliser still has to scale."""
        responses = zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        graded = [(rollout, verdict, reward) for rollout, verdict, reward in responses if reward is not None]
        right_G = [
            success for success, reward in zip(self._successes(group), group.rewards, strict=True) if reward is not None
        ]
        advantages_G = self.advantage([reward - self._penalty(rollout) for rollout, _, reward in graded], group.earlier)
        factors_G, hints_G = self.routing(right_G), [None] * len(graded)
        if self.self_distillation:
            hints_G = self.self_distillation.hints([rollout for rollout, *_ in graded], right_G, self._feedback(group))
            factors_G = [factor * (hint is not None) for factor, hint in zip(factors_G, hints_G, strict=True)]
        parts = zip(graded, advantages_G, factors_G, hints_G, right_G, strict=True)
        return [
            Sample(
                prompt=group.prompt,
                response_ids=rollout.response_ids,
                advantage=advantage,
                pg_weight=self._pg_weight(advantage, factor),
                kl_weight=self.beta * factor,
                reference_weight=self.reference_beta,
                success=success,
                logp_rollout=rollout.logp_rollout,
                logp_teacher=rollout.logp_teacher,
                hint=hint,
                experts=rollout.experts,
            )
            for (rollout, *_), advantage, factor, hint, success in parts
        ]

    def _successes(self, group: Group) -> list[float]:
        """[G] what routing reads, within [0, 1]; 0 where a response has no such value, which then has no reward."""
        if self.routing_term == "accuracy":
            return [float(verdict.outcome == "correct") for verdict in group.verdicts]
        values = group.values or [{}] * len(group.rollouts)
        return [min(max(of_response.get(self.routing_term) or 0.0, 0.0), 1.0) for of_response in values]

    def _feedback(self, group: Group) -> list[str | None]:
        """What is wrong with each graded response: in the words of a reward function, else by the grader's verdict
        where that is what counts."""
        said_G = group.feedback or (None,) * len(group.rollouts)
        graded = zip(said_G, group.verdicts, group.rewards, strict=True)
        by_verdict = self.routing_term == "accuracy"
        return [
            said or (feedback_on(verdict) if by_verdict else None)
            for said, verdict, reward in graded
            if reward is not None
        ]

    def _pg_weight(self, advantage: float, kl_factor: float) -> float:
        if advantage == 0.0 and self.entropy_bonus == 0.0:
            return 0.0
        return 1.0 - kl_factor if self.exclusive_terms else 1.0

    def _penalty(self, rollout: Rollout) -> float:
        return self.overlong(len(rollout.response_ids), self.max_response_tokens) if self.overlong else 0.0

    # -- the trainer's part ----------------------------------------------------------------------------------------

    def policy_terms(self, batch: MicroBatch) -> PolicyTerms:
        """The inputs of `linear_policy_loss` at each of the N tokens, without the KL term where `divergence` is set:
        that one is `linear_kl`'s."""
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
            logp_reference_N=batch.logp_reference_N,
            reference_weight_N=None if batch.logp_reference_N is None else batch.reference_weight_N,
        )

    def loss_options(self) -> dict:
        """The keywords of `linear_policy_loss`."""
        return {
            "surrogate": self.ratio.surrogate,
            "clip_eps_low": self.clip_eps_low,
            "clip_eps_high": self.clip_eps_high,
            "entropy_bonus": self.entropy_bonus,
            "kl_clamp": self.kl_clamp,
        }

    def divergence_options(self) -> dict:
        """The keywords of `linear_kl`, where `divergence` is set."""
        assert self.divergence is not None
        return self.divergence.options()


def _scaled(sample: Sample, scale: float, minibatch: int) -> Sample:
    weights = {name: getattr(sample, name) * scale for name in ("pg_weight", "kl_weight", "reference_weight")}
    return replace(sample, minibatch=minibatch, **weights)


def split_minibatches(samples: Sequence[Sample]) -> list[list[Sample]]:
    """One list of samples per update, in order. Each list holds all samples, so that a sample keeps its position; those
    of other updates have no weight."""
    numbers = sorted({sample.minibatch for sample in samples}) or [0]
    return [[s if s.minibatch == number else s.without_weights() for s in samples] for number in numbers]


def assign_sft_weights(responses: Sequence[Sample]) -> list[Sample]:
    """Weights of stage 1 (VOLD Eq. 4): at ratio 1 and A = 1 the policy gradient *is* the gradient of the mean
    negative log-likelihood, so SFT runs through the same fused loss. responses: of the whole step, on all ranks."""
    lengths = [len(sample.response_ids) for sample in responses]
    weights = normalisers.tokens(lengths, 0)
    return [
        replace(sample, advantage=1.0, pg_weight=weight, kl_weight=0.0)
        for sample, weight in zip(responses, weights, strict=True)
    ]
