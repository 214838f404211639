"""A frozen reference: the term that holds the student near the model it started from, beside a teacher or without one.

It reads what the student reads, images included. Behind adapters it is the trainer's own weights with the adapter
switched off (BaseTeacher), without a second copy. N targets of a micro-batch, n of them with a reference term.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vold.objectives.divergences import VocabularyDivergence
from vold.teacher.scorer import Teacher
from vold.types import Batch, DistributionTerm, MicroBatch

NAME = "reference"
"""Of its term: metrics reference_kl, reference_loss."""


class NoReference:
    """The reference of objectives without one: changes nothing."""

    def score(self, batch: Batch) -> Batch:
        return batch


class Reference(NoReference):
    """model: reads with the student's own prompt encoder, whole distributions where `divergence` is one of them;
    divergence: None for k3 of the sampled tokens."""

    def __init__(self, model: Teacher, divergence: VocabularyDivergence | None):
        self._model, self._divergence = model, divergence

    def score(self, batch: Batch) -> Batch:
        """The batch with the reference's log-probs, or its whole distributions as one of the further terms, on the last
        pipeline stage. The batch stays where it is, the scores are on the device; ranks call as for Teacher.score."""
        rows = [_rows(micro) for micro in batch.micro_batches]
        outputs, head_UE = self._model.read(batch, rows)
        if head_UE is None:
            return batch
        triples = zip(batch.micro_batches, rows, outputs, strict=True)
        return Batch(
            tuple(
                micro if output is None else self._with_scores(micro, rows_n, output, head_UE)
                for micro, rows_n, output in triples
            )
        )

    def _with_scores(self, micro: MicroBatch, rows_n: Tensor, output: Tensor, head_UE: Tensor) -> MicroBatch:
        assert micro.reference_weight_N is not None
        if self._divergence is None:
            logp_N = output.new_zeros(micro.reference_weight_N.shape, dtype=torch.float32)
            logp_N.index_copy_(0, rows_n.to(output.device, non_blocking=True), output.to(logp_N))
            return replace(micro, logp_reference_N=logp_N)
        term = DistributionTerm(
            NAME,
            micro.reference_weight_N,
            (output, head_UE),
            self._divergence.options(),
            self._divergence.ratio_cap,
        )
        return replace(micro, further_terms=(*micro.further_terms, term))


def _rows(micro: MicroBatch) -> Tensor:
    weight_N = micro.reference_weight_N
    return torch.zeros(0, dtype=torch.int64) if weight_N is None else (weight_N != 0).nonzero()[:, 0]
