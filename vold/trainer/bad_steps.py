"""The steps that change no parameter, by one rule for every stage and method: an update whose loss, likelihoods or
gradient are not finite on any rank is not made, and neither is one without any gradient (moments and weight decay alone
would move the weights). Metric `skipped` counts both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vold.io import log
from vold.trainer.metrics import MicroBatchStats
from vold.types import Batch, Diverged, MicroBatch

REMEDY = "lower optimizer.lr, or look at the last rows of samples.jsonl"


class BadSteps:
    """Counts bad steps in a row, up to `limit`: those that are not finite, and those without a graded response. A step
    whose gradient is zero is none: it neither counts nor ends the row."""

    def __init__(self, limit: int):
        self._limit, self._count = limit, 0

    def reset(self) -> None:
        """An update was made."""
        self._count = 0

    def add(self, reason: str, remedy: str = REMEDY) -> None:
        """One more, the same on every rank. Raises Diverged, with `remedy`, at the limit."""
        self._count += 1
        if self._count >= self._limit:
            raise Diverged(
                f"{reason} for {self._count} steps in a row (optimizer.max_bad_steps); no parameter was changed by "
                f"them; {remedy}"
            )


def check_ids(batch: Batch, vocab_size: int) -> None:
    """Raise ValueError where a response has an id that both models do not really have: its likelihood would be 0."""
    for sample in (sample for micro in batch.micro_batches for sample in micro.samples_B):
        beyond = sample.response_ids[sample.response_ids >= vocab_size]
        if len(beyond):
            raise ValueError(
                f"{sample.prompt.id}: the response has token id {beyond[0]} and ids end at "
                f"{vocab_size - 1}; its tokenizer is another model's"
            )


def nonfinite_flag(stats: Sequence[MicroBatchStats], device: torch.device) -> Tensor:
    """[] float32 on the device: 1 where a loss, log-probability or divergence is not finite, on any rank, else 0. A
    collective over all ranks. stats: of the update, on the last pipeline stage; else empty."""
    flag = torch.zeros((), device=device)
    if stats:
        flag = (~torch.stack([s.sums_M.isfinite().all() for s in stats]).all()).float()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def nonfinite_reason(batch: Batch, stats: Sequence[MicroBatchStats]) -> str:
    """Why an update whose `nonfinite_flag` is 1 must not be made. A collective over all ranks."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _first_nonfinite(batch.micro_batches, stats))
    where = next((reason for reason in found if reason), "the loss")
    return f"{where} was not finite"


def _first_nonfinite(micro_batches: Sequence[MicroBatch], stats: Sequence[MicroBatchStats]) -> str | None:
    """The first response of this rank with a likelihood or KL term that is not finite."""
    for micro, s in zip(micro_batches, stats, strict=False):
        weighted_N = (micro.pg_weight_N != 0) | (micro.kl_weight_N != 0)
        if micro.reference_weight_N is not None:
            weighted_N = weighted_N | (micro.reference_weight_N != 0)
        bad_N = weighted_N & ~s.logp_N.isfinite()
        sequences = micro.sequence_N[bad_N].tolist() + (~s.kl_B.isfinite()).nonzero()[:, 0].tolist()
        if sequences:
            return f"the likelihood of a response to {micro.samples_B[sequences[0]].prompt.id}"
    return None


def warn(reason: str) -> None:
    """Say on rank 0 that the step trains nothing, and why."""
    if dist.get_rank() == 0:
        log.warning("%s; this step trains nothing", reason)
