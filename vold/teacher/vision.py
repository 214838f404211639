"""VA-OPD's teacher: scores responses with the images and with degraded ones, and gives KL terms more weight where its
log-probability depends on the detail of the image.

L response tokens of one sequence, N targets of a micro-batch, n of them in responses to images.
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
from vold.trainer.own_targets import of_all_ranks, own_targets
from vold.types import Batch, MicroBatch


@dataclass(frozen=True)
class _Response:
    """A response to a prompt with images.

    micro_batch  index of its micro-batch
    sample       its index among the step's samples
    prompt       the prompt's id
    rows_L       which of the micro-batch's N targets are its tokens
    advantage_L  a_t, the visual advantage of each token, nats
    """

    micro_batch: int
    sample: int
    prompt: str
    rows_L: Tensor
    advantage_L: Tensor


class VisualAdvantageTeacher(Teacher):
    """Multiplies the KL weight of token t of response i to an image by G w_i * L_i share_t (formulas: see
    vold.objectives.visual_advantage), which turns weights 1 / (B L_i), objective.normaliser: sequences, into those of
    VA-OPD.

    degraded: encodes a prompt with images that have lost their detail; only responses to images are read twice.
    absolute: whether what the detail lowers counts too.
    metrics: visual_advantage, mean a_t in nats; visual_top_share, the part of all a_t that the top 10 % of tokens have
    (of each replica's tokens).
    """

    def __init__(
        self, checkpoint: Path, layout: Layout, *, degraded: PromptEncoder, absolute: bool = False, **settings
    ):
        super().__init__(checkpoint, layout, **settings)
        self._degraded, self._absolute = degraded, absolute

    def _score(self, batch: Batch) -> Batch:
        rows = [_rows_with_images(micro) for micro in batch.micro_batches]
        degraded = self._read(batch, rows, self._degraded, self._logprob_head)
        batch = super()._score(batch)
        rows = [rows_n.to(self._layout.device, non_blocking=True) for rows_n in rows]
        if self._layout.is_last_stage:
            responses = [
                response
                for index, (micro, rows_n, logp_n) in enumerate(zip(batch.micro_batches, rows, degraded, strict=True))
                if logp_n is not None
                for response in _responses(index, micro, rows_n, self._advantage(micro, rows_n, logp_n))
            ]
            weights, self.metrics = _response_weights(responses, self._layout.dp_group)
            batch = _with_visual_weights(batch, responses, weights)
        self.metrics = self._layout.from_last_stage(self.metrics)
        return batch

    def _advantage(self, micro: MicroBatch, rows_n: Tensor, logp_degraded_n: Tensor) -> Tensor:
        logp_n = self._logp_teacher(micro)[rows_n]
        return token_advantage(logp_n, logp_degraded_n.to(logp_n), absolute=self._absolute)

    def _logp_teacher(self, micro: MicroBatch) -> Tensor:
        """[N] log-probabilities with the images as they are; from hidden states where the batch has those."""
        if micro.hidden_teacher_nE is None:
            assert micro.logp_teacher_N is not None
            return micro.logp_teacher_N
        own = own_targets(micro, self._layout)
        scored_n = (own.kl_weight_N != 0).nonzero()[:, 0]
        logp_n = self._logp(micro.hidden_teacher_nE, own.target_N[scored_n]).to(own.kl_weight_N)
        return of_all_ranks(micro, torch.zeros_like(own.kl_weight_N).index_copy(0, scored_n, logp_n), self._layout)


def _rows_with_images(micro: MicroBatch) -> Tensor:
    has_image_B = torch.tensor([bool(sample.prompt.images) for sample in micro.samples_B], dtype=torch.bool)
    has_image_N = has_image_B.to(micro.sequence_N.device)[micro.sequence_N]
    return ((micro.kl_weight_N != 0) & has_image_N).nonzero()[:, 0]


def _responses(micro_batch: int, micro: MicroBatch, rows_n: Tensor, advantage_n: Tensor) -> list[_Response]:
    sequence_n = micro.sequence_N[rows_n]
    responses = []
    for sequence in sequence_n.unique().tolist():
        tokens_n, prompt = sequence_n == sequence, micro.samples_B[sequence].prompt.id
        sample, rows_L = micro.sample_B[sequence], rows_n[tokens_n]
        responses.append(_Response(micro_batch, sample, prompt, rows_L, advantage_n[tokens_n]))
    return responses


def _response_weights(
    responses: Sequence[_Response], group: dist.ProcessGroup
) -> tuple[dict[int, float], dict[str, float]]:
    """G w_i by sample index, and the metrics. Siblings may be on several data-parallel replicas, so that all replicas
    exchange their responses' means."""
    advantage_N = torch.cat([response.advantage_L for response in responses]) if responses else torch.zeros(0)
    total = float(advantage_N.sum())
    top = float(concentration(advantage_N)) * total if responses else 0.0
    means = {r.sample: (r.prompt, float(r.advantage_L.mean())) for r in responses}
    replicas: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(replicas, (means, (total, top, len(advantage_N))), group=group)
    prompts: dict[str, dict[int, float]] = {}
    for replica_means, _ in replicas:
        for sample, (prompt, mean) in replica_means.items():
            prompts.setdefault(prompt, {})[sample] = mean
    weights: dict[int, float] = {}
    for siblings in prompts.values():
        weights_G = rollout_weights(torch.tensor(list(siblings.values()), dtype=torch.float64))
        weights |= zip(siblings, (len(siblings) * weights_G).tolist(), strict=True)
    total, top, count = (sum(numbers) for numbers in zip(*(sums for _, sums in replicas), strict=True))
    metrics = {"visual_advantage": total / count} if count else {}
    return weights, metrics | ({"visual_top_share": top / total} if total else {})


def _with_visual_weights(batch: Batch, responses: Sequence[_Response], weights: dict[int, float]) -> Batch:
    kl_weights = [micro.kl_weight_N.clone() for micro in batch.micro_batches]
    for response in responses:
        factor_L = weights[response.sample] * len(response.rows_L) * token_weights(response.advantage_L)
        kl_weights[response.micro_batch][response.rows_L] *= factor_L
    pairs = zip(batch.micro_batches, kl_weights, strict=True)
    return Batch(tuple(replace(micro, kl_weight_N=kl_weight_N) for micro, kl_weight_N in pairs))
