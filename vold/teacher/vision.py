"""A teacher that looks twice (VA-OPD): its KL terms weigh most where its opinion hangs on the detail of an image.

L response tokens of one sequence, N targets of a micro-batch, n of them in answer to an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vold.data.packing import PromptEncoder
from vold.objectives.visual_advantage import concentration, rollout_weights, token_advantage, token_weights
from vold.parallel.launch import Layout
from vold.teacher.scorer import Teacher
from vold.types import Batch, MicroBatch


@dataclass(frozen=True)
class _Response:
    """To an image: its micro-batch, its place among the step's samples, its prompt, which of N are its tokens, a_t."""

    micro: int
    place: int
    prompt: str
    rows_L: Tensor
    advantage_L: Tensor


class VisualAdvantageTeacher(Teacher):
    """Multiplies the KL weight of token t of response i to an image by G w_i * L_i share_t (formulas: see
    vold.objectives.visual_advantage), which makes of weights 1 / (B L_i), objective.normaliser: sequences, those of
    VA-OPD. `degraded`: how the teacher reads a prompt whose images have lost their detail; only responses to images are
    read twice.

    metrics: visual_advantage, mean a_t in nats; visual_top_share, the part of all a_t that the top 10 % of tokens have
    (of each replica's tokens).
    """

    def __init__(self, checkpoint: Path, layout: Layout, *, degraded: PromptEncoder, **settings):
        super().__init__(checkpoint, layout, **settings)
        self._degraded = degraded

    def _scored(self, batch: Batch) -> Batch:
        batch = super()._scored(batch)
        rows = [_rows_with_images(micro) for micro in batch.micro_batches]
        degraded = self._read(batch, rows, self._degraded, self._logprobs)
        if self._layout.is_last_stage:
            responses = [
                response
                for number, (micro, rows_n, logp_n) in enumerate(zip(batch.micro_batches, rows, degraded, strict=True))
                if logp_n is not None
                for response in _responses(number, micro, rows_n, self._logp_teacher(micro)[rows_n], logp_n)
            ]
            weights, self.metrics = _among_siblings(responses, self._layout.dp_group)
            batch = _weighed(batch, responses, weights)
        self.metrics = self._layout.from_last_stage(self.metrics)
        return batch

    def _logp_teacher(self, micro: MicroBatch) -> Tensor:
        """[N], on the images as they are; of hidden states where those are what the loss wants."""
        if micro.hidden_teacher_nE is None:
            return micro.logp_teacher_N
        scored_n = (micro.kl_weight_N != 0).nonzero()[:, 0]
        logp_n = self._logp(micro.hidden_teacher_nE, micro.target_N[scored_n])
        return torch.zeros_like(micro.kl_weight_N).index_copy(0, scored_n, logp_n.to(micro.kl_weight_N))


def _rows_with_images(micro: MicroBatch) -> Tensor:
    seen_B = torch.tensor([bool(sample.prompt.images) for sample in micro.samples_B], dtype=torch.bool)
    return ((micro.kl_weight_N != 0) & seen_B.to(micro.sequence_N.device)[micro.sequence_N]).nonzero()[:, 0]


def _responses(
    number: int, micro: MicroBatch, rows_n: Tensor, logp_n: Tensor, logp_degraded_n: Tensor
) -> list[_Response]:
    advantage_n = token_advantage(logp_n, logp_degraded_n.to(logp_n))
    sequence_n = micro.sequence_N[rows_n]
    found = []
    for sequence in sequence_n.unique().tolist():
        mine_n, prompt = sequence_n == sequence, micro.samples_B[sequence].prompt.id
        found.append(_Response(number, micro.sample_B[sequence], prompt, rows_n[mine_n], advantage_n[mine_n]))
    return found


def _among_siblings(
    responses: Sequence[_Response], group: dist.ProcessGroup
) -> tuple[dict[int, float], dict[str, float]]:
    """G w_i by place, and the metrics. Siblings may lie on several data-parallel replicas: each tells its means."""
    all_N = torch.cat([response.advantage_L for response in responses]) if responses else torch.zeros(0)
    total = float(all_N.sum())
    top = float(concentration(all_N)) * total if responses else 0.0
    mine = ({r.place: (r.prompt, float(r.advantage_L.mean())) for r in responses}, (total, top, len(all_N)))
    replicas: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(replicas, mine, group=group)
    prompts: dict[str, dict[int, float]] = {}
    for means, _ in replicas:
        for place, (prompt, mean) in means.items():
            prompts.setdefault(prompt, {})[place] = mean
    weights: dict[int, float] = {}
    for means in prompts.values():
        weights_G = rollout_weights(torch.tensor(list(means.values()), dtype=torch.float64))
        weights |= zip(means, (len(means) * weights_G).tolist(), strict=True)
    total, top, count = (sum(numbers) for numbers in zip(*(sums for _, sums in replicas), strict=True))
    metrics = {"visual_advantage": total / count} if count else {}
    return weights, metrics | ({"visual_top_share": top / total} if total else {})


def _weighed(batch: Batch, responses: Sequence[_Response], weights: dict[int, float]) -> Batch:
    kl_weights = [micro.kl_weight_N.clone() for micro in batch.micro_batches]
    for response in responses:
        factor_L = weights[response.place] * len(response.rows_L) * token_weights(response.advantage_L)
        kl_weights[response.micro][response.rows_L] *= factor_L
    pairs = zip(batch.micro_batches, kl_weights, strict=True)
    return Batch(tuple(replace(micro, kl_weight_N=kl_weight_N) for micro, kl_weight_N in pairs))
