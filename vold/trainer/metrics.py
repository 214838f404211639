"""Sums over tokens that one micro-batch contributes to a step's metrics, added over micro-batches and ranks.

Nothing here touches the host until the step is over.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vold.types import MicroBatch
from vold_kernels import KLLoss, PolicyLoss

ValueT = TypeVar("ValueT")
SUMS = (
    "tokens",
    "read_tokens",
    "loss",
    "pg_loss",
    "kl_loss",
    "nll",
    "entropy",
    "clip_fraction_low",
    "clip_fraction_high",
    "kl_tokens",
    "kl_teacher",
    "kl_clamped",
    "rollout_tokens",
    "mismatch",
    "kl_rollout",
    "importance",
    "importance_squared",
    "importance_truncated",
)


@torch.no_grad()
def micro_batch_stats(
    out: PolicyLoss,
    batch: MicroBatch,
    *,
    importance_cap: float | None = None,
    kl_clamp: float = math.inf,
    full: KLLoss | None = None,
) -> dict[str, Tensor]:
    """sums: [len(SUMS)] float64; mismatch_max: largest |logp_rollout - logp|; kl_B, kl_count_B: per sequence; logp_N.
    The importance weights are those of the loss, none without a cap.

    full: the divergence of whole distributions, where that is the distillation term. Log-probs are then known only
    where there is a policy gradient."""
    logp_N = out.logp_N.double()
    live_N = ((batch.pg_weight_N != 0) | (batch.kl_weight_N != 0)).double()
    read_N = live_N if full is None else (batch.pg_weight_N != 0).double()
    scored_N = (batch.kl_weight_N != 0).double()
    pull_N = torch.zeros_like(logp_N)
    if batch.logp_teacher_N is not None:
        pull_N = torch.where(scored_N > 0, logp_N - batch.logp_teacher_N, 0.0)
    kl_N = 0.5 * pull_N.square()
    if full is not None:
        kl_N[batch.kl_weight_N != 0] = full.kl_N.double()
    gap_N, compared_N = torch.zeros_like(logp_N), torch.zeros_like(live_N)
    if batch.logp_rollout_N is not None:
        sampled_from_N = logp_N if batch.logp_old_N is None else batch.logp_old_N  # the weights that the sampler had
        gap_N, compared_N = torch.where(read_N > 0, batch.logp_rollout_N - sampled_from_N, 0.0), read_N
    ratio_N = torch.zeros_like(gap_N) if importance_cap is None else (-gap_N).exp() * compared_N
    weight_N = ratio_N.clamp(max=importance_cap or math.inf)
    values = {
        "tokens": live_N.sum(),
        "read_tokens": read_N.sum(),
        "loss": out.loss if full is None else out.loss + full.loss,
        "pg_loss": out.pg_loss,
        "kl_loss": out.kl_loss if full is None else full.loss,
        "nll": -(logp_N * read_N).sum(),
        "entropy": (out.entropy_N * read_N).sum(),
        "clip_fraction_low": out.clip_count_low,
        "clip_fraction_high": out.clip_count_high,
        "kl_tokens": scored_N.sum(),
        "kl_teacher": kl_N.sum(),
        "kl_clamped": (pull_N.abs() > kl_clamp).sum(),
        "rollout_tokens": compared_N.sum(),
        "mismatch": gap_N.abs().sum(),
        "kl_rollout": gap_N.sum(),
        "importance": weight_N.sum(),
        "importance_squared": weight_N.square().sum(),
        "importance_truncated": (weight_N < ratio_N).sum(),
    }
    sequences = torch.zeros(len(batch.sample_B), dtype=torch.float64, device=logp_N.device)
    return {
        "sums": torch.stack([values[name].double() for name in SUMS]),
        "mismatch_max": gap_N.abs().amax() if gap_N.numel() else gap_N.new_zeros(()),
        "kl_B": sequences.index_add(0, batch.sequence_N, kl_N),
        "kl_count_B": sequences.index_add(0, batch.sequence_N, scored_N),
        "logp_N": out.logp_N,
    }


def reduce_stats(
    tallies: Sequence[dict[str, Tensor]], group: dist.ProcessGroup, *, train_tflop: float
) -> dict[str, float]:
    """Means per token (nats) over all ranks of `group`; counts and work stay sums."""
    sums = torch.stack([t["sums"] for t in tallies]).sum(0)
    sums = torch.cat([sums, sums.new_tensor([train_tflop])])
    largest = torch.stack([t["mismatch_max"] for t in tallies]).amax(0)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = dict(zip((*SUMS, "train_tflop"), sums.tolist(), strict=True))
    metrics = {key: total[key] for key in ("loss", "pg_loss", "kl_loss", "train_tflop")}
    metrics["gradient_tokens"] = total["tokens"]
    if total["read_tokens"]:  # none where whole distributions are compared and nothing else is learnt from
        for key in ("nll", "entropy", "clip_fraction_low", "clip_fraction_high"):
            metrics[key] = total[key] / total["read_tokens"]
    if total["kl_tokens"]:
        metrics["kl_teacher"] = total["kl_teacher"] / total["kl_tokens"]
        metrics["kl_clamped"] = total["kl_clamped"] / total["kl_tokens"]
        metrics["kl_tokens"] = total["kl_tokens"]
    if total["rollout_tokens"]:
        metrics["mismatch_mean"] = total["mismatch"] / total["rollout_tokens"]
        metrics["mismatch_max"] = float(largest)
        metrics["mismatch_kl"] = total["kl_rollout"] / total["rollout_tokens"]
    if total["importance"]:  # Kish's effective sample size, as a share of the tokens
        metrics["importance_truncated"] = total["importance_truncated"] / total["rollout_tokens"]
        metrics["effective_sample_size"] = total["importance"] ** 2 / (
            total["rollout_tokens"] * total["importance_squared"]
        )
    return metrics


def mean_kl(
    batches: Sequence[MicroBatch], tallies: Sequence[dict[str, Tensor]], group: dist.ProcessGroup
) -> dict[int, float]:
    """Sample place -> mean 1/2 (logp - logp_teacher)^2 over its tokens, for the samples of all ranks of `group` that
    had a KL term."""
    means: dict[int, float] = {}
    for batch, t in zip(batches, tallies, strict=True):
        for place, total, count in zip(batch.sample_B, t["kl_B"].tolist(), t["kl_count_B"].tolist(), strict=True):
            if count:
                means[place] = total / count
    return _of_all_ranks(means, group)


def token_logps(
    batches: Sequence[MicroBatch],
    tallies: Sequence[dict[str, Tensor]],
    shown: Container[int],
    group: dist.ProcessGroup,
) -> dict[int, dict[str, list[float]]]:
    """Sample place -> `logp` and, with a KL term, `logp_teacher` of its tokens, for the samples of all ranks of `group`
    that are among `shown`."""
    found: dict[int, dict[str, list[float]]] = {}
    for batch, t in zip(batches, tallies, strict=True):
        for sequence, place in enumerate(batch.sample_B):
            if place in shown:
                mine_N = batch.sequence_N == sequence
                found[place] = {"logp": t["logp_N"][mine_N].tolist()}
                if batch.logp_teacher_N is not None and bool(batch.kl_weight_N[mine_N].any()):
                    found[place]["logp_teacher"] = batch.logp_teacher_N[mine_N].tolist()
    return _of_all_ranks(found, group)


def _of_all_ranks(mine: dict[int, ValueT], group: dist.ProcessGroup) -> dict[int, ValueT]:
    shares: list[dict[int, ValueT]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(shares, mine, group=group)
    return {place: value for share in shares for place, value in share.items()}
