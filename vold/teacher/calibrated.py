"""A teacher whose log-probs are changed before they are a loss: TOP-D's mixture, Uni-OPD's margin
(vold.objectives.calibration).

N targets of a micro-batch, n of them of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vold.objectives import Objective
from vold.objectives.calibration import margin_advantages, mixed_teacher
from vold.parallel.launch import Layout
from vold.teacher.scorer import NoTeacher, Teacher
from vold.types import Batch, MicroBatch, Sample


class _Response(NamedTuple):
    """One response with a KL term: its micro-batch, its rows there, and what its siblings have to know of it."""

    micro_batch: int
    rows_n: Tensor
    sample: int
    prompt: str
    gain: float
    success: float


class CalibratedTeacher:
    """teacher: scores sampled tokens, in `score` or with the rollouts. metrics: margin_shift, the mean over prompts
    with right and wrong responses of what was missing to the margin, nats."""

    def __init__(self, teacher: Teacher | NoTeacher, objective: Objective, layout: Layout):
        self._teacher, self._objective, self._layout = teacher, objective, layout
        self.metrics: dict[str, float] = {}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """See Teacher."""
        return self._teacher.drop_unscorable(samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """See Teacher. A collective over the replicas where there is a margin."""
        batch = self._teacher.score(batch)
        found: dict[str, float] = {}
        if self._layout.is_last_stage:
            micros = [self._with_mixture(micro) for micro in batch.micro_batches]
            if self._objective.margin is not None:
                micros, found = self._with_margin(micros, self._objective.margin)
            batch = Batch(tuple(micros))
        self.metrics = {**self._teacher.metrics, **self._layout.from_last_stage(found)}
        return batch

    def _with_mixture(self, micro: MicroBatch) -> MicroBatch:
        if micro.logp_teacher_N is None or micro.logp_rollout_N is None or self._objective.teacher_share == 1.0:
            return micro
        logp_sampled_N = micro.logp_rollout_N.to(micro.logp_teacher_N)
        mixed_N = mixed_teacher(micro.logp_teacher_N, logp_sampled_N, self._objective.teacher_share)
        return replace(micro, logp_teacher_N=torch.where(micro.kl_weight_N.to(mixed_N) != 0, mixed_N, 0.0))

    def _with_margin(self, micros: list[MicroBatch], margin: float) -> tuple[list[MicroBatch], dict[str, float]]:
        own = [response for index, micro in enumerate(micros) for response in _responses(index, micro)]
        replicas: list = [None] * self._layout.dp
        summary = {r.sample: (r.prompt, r.gain, r.success) for r in own}
        dist.all_gather_object(replicas, summary, group=self._layout.dp_group)
        advantages, shifts = _advantages({k: v for replica in replicas for k, v in replica.items()}, margin)
        for response in own:
            if advantage := advantages[response.sample]:
                micro = micros[response.micro_batch]
                micros[response.micro_batch] = _with_advantage(micro, response.rows_n, advantage)
        return micros, {"margin_shift": sum(shifts) / len(shifts)} if shifts else {}


def _responses(index: int, micro: MicroBatch) -> list[_Response]:
    if micro.logp_teacher_N is None or micro.logp_rollout_N is None:
        return []
    gain_N = micro.logp_teacher_N.double() - micro.logp_rollout_N.to(micro.logp_teacher_N).double()
    scored_N = micro.kl_weight_N.to(gain_N) != 0
    found = []
    for sequence, sample in enumerate(micro.samples_B):
        rows_n = ((micro.sequence_N.to(gain_N.device) == sequence) & scored_N).nonzero()[:, 0]
        if len(rows_n):
            gain = float(gain_N[rows_n].mean())
            found.append(_Response(index, rows_n, micro.sample_B[sequence], sample.prompt.id, gain, sample.success))
    return found


def _advantages(responses: dict[int, tuple[str, float, float]], margin: float) -> tuple[dict[int, float], list[float]]:
    """What each sample's tokens gain, and the shift of each prompt that has right and wrong responses."""
    prompts: dict[str, list[int]] = {}
    for sample in sorted(responses):
        prompts.setdefault(responses[sample][0], []).append(sample)
    advantages: dict[int, float] = {}
    shifts = []
    for siblings in prompts.values():
        right_G = [responses[sample][2] for sample in siblings]
        found = margin_advantages([responses[sample][1] for sample in siblings], right_G, margin)
        advantages |= dict(zip(siblings, found, strict=True))
        if 0 < sum(success == 1.0 for success in right_G) < len(right_G):
            shifts.append(2 * max(found))
    return advantages, shifts


def _with_advantage(micro: MicroBatch, rows_n: Tensor, advantage: float) -> MicroBatch:
    """kl_weight * advantage joins what the policy gradient of these tokens has, weight times advantage."""
    pg_weight_N, advantage_N = micro.pg_weight_N.clone(), micro.advantage_N.clone()
    rows_n = rows_n.to(pg_weight_N.device)
    kl_n, old_n = micro.kl_weight_N[rows_n], pg_weight_N[rows_n]
    weight_n = torch.where(old_n != 0, old_n, kl_n)
    advantage_N[rows_n] = torch.where(old_n != 0, advantage_N[rows_n], 0.0) + advantage * kl_n / weight_n
    pg_weight_N[rows_n] = weight_n
    return replace(micro, pg_weight_N=pg_weight_N, advantage_N=advantage_N)
