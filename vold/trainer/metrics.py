"""Sums over tokens that each micro-batch adds to a step's metrics, reduced over micro-batches and ranks.

They stay on the device until the step is over. N targets of a micro-batch, B of its sequences, M sums (SUM_NAMES).
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vold.parallel.context import sum_over_tokens
from vold.parallel.launch import Layout
from vold.types import MicroBatch
from vold_kernels import KLLoss, PolicyLoss

ValueT = TypeVar("ValueT")
SUM_NAMES = (
    "gradient_tokens",  # whose policy-gradient or KL weight is not 0
    "policy_tokens",  # of these, those whose log-probability was computed
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
    "rollout_tokens",  # with a log-probability from the sampler
    "mismatch",
    "mismatch_kl",
    "importance",
    "importance_squared",
    "importance_truncated",
)


@dataclass(frozen=True)
class MicroBatchStats:
    """One micro-batch's share of a step's metrics.

    sums_M        float64, in the order of SUM_NAMES
    mismatch_max  largest |logp_rollout - logp|, nats
    kl_B          float64, each sequence's KL term summed over its tokens: nats^2 of k2, else nats
    kl_tokens_B   float64, how many tokens of each sequence have a KL term
    logp_N        log-probability of each target under the current weights, nats
    terms_3       float64, of each further KL term by name: its sum over tokens (nats), their number, and its loss
    """

    sums_M: Tensor
    mismatch_max: Tensor
    kl_B: Tensor
    kl_tokens_B: Tensor
    logp_N: Tensor
    terms_3: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def micro_batch_stats(
    policy: PolicyLoss,
    micro: MicroBatch,
    *,
    divergence: KLLoss | None = None,
    further: Sequence[KLLoss] = (),
    kl_clamp: float = math.inf,
    importance_cap: float | None = None,
) -> MicroBatchStats:
    """Sums of one micro-batch, from what the loss functions returned; further: of each of micro.further_terms.

    divergence: the full-vocabulary divergence, where that is the distillation term; log-probabilities are then known
    only where there is a policy gradient. kl_clamp, importance_cap: as the loss had them.
    """
    logp_N = policy.logp_N.double()
    gradient_N = ((micro.pg_weight_N != 0) | (micro.kl_weight_N != 0)).double()
    policy_N = gradient_N if divergence is None else (micro.pg_weight_N != 0).double()
    scored_N = (micro.kl_weight_N != 0).double()
    log_ratio_teacher_N = torch.zeros_like(logp_N)
    if micro.logp_teacher_N is not None:
        log_ratio_teacher_N = torch.where(scored_N > 0, logp_N - micro.logp_teacher_N, 0.0)
    kl_N = 0.5 * log_ratio_teacher_N.square()
    if divergence is not None:
        kl_N = kl_N.masked_scatter(micro.kl_weight_N != 0, divergence.kl_N.double())
    mismatch, mismatch_max = _mismatch_sums(logp_N, micro, policy_N, importance_cap)
    sums = {
        "gradient_tokens": gradient_N.sum(),
        "policy_tokens": policy_N.sum(),
        "loss": sum((x.loss for x in further), policy.loss if divergence is None else policy.loss + divergence.loss),
        "pg_loss": policy.pg_loss,
        "kl_loss": policy.kl_loss if divergence is None else divergence.loss,
        "nll": -(logp_N * policy_N).sum(),
        "entropy": (policy.entropy_N * policy_N).sum(),
        "clip_fraction_low": policy.clip_count_low,
        "clip_fraction_high": policy.clip_count_high,
        "kl_tokens": scored_N.sum(),
        "kl_teacher": kl_N.sum(),
        "kl_clamped": (log_ratio_teacher_N.abs() > kl_clamp).sum(),
        **mismatch,
    }
    zeros_B = torch.zeros(len(micro.sample_B), dtype=torch.float64, device=logp_N.device)
    return MicroBatchStats(
        sums_M=torch.stack([sums[name].double() for name in SUM_NAMES]),
        mismatch_max=mismatch_max,
        kl_B=zeros_B.index_add(0, micro.sequence_N, kl_N),
        kl_tokens_B=zeros_B.index_add(0, micro.sequence_N, scored_N),
        logp_N=policy.logp_N,
        terms_3=_further_sums(policy, micro, further),
    )


def _further_sums(policy: PolicyLoss, micro: MicroBatch, further: Sequence[KLLoss]) -> dict[str, Tensor]:
    """See MicroBatchStats.terms_3."""
    found = {
        term.name: torch.stack([x.kl_N.double().sum(), (term.weight_N != 0).sum().double(), x.loss.double()])
        for term, x in zip(micro.further_terms, further, strict=True)
    }
    if micro.logp_reference_N is not None and micro.reference_weight_N is not None:
        has_N = micro.reference_weight_N != 0
        gain_N = torch.where(has_N, micro.logp_reference_N - policy.logp_N, 0.0).double()
        k3 = (gain_N.expm1() - gain_N).sum()
        found["reference"] = torch.stack([k3, has_N.sum().double(), policy.reference_loss.double()])
    return found


def _mismatch_sums(
    logp_N: Tensor, micro: MicroBatch, policy_N: Tensor, importance_cap: float | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over how far sampler and trainer are apart on the sampled tokens, and the largest gap in nats.

    importance: min(pi / pi_rollout, importance_cap), the weights of the loss; 0 without a cap.
    """
    gap_N, compared_N = torch.zeros_like(logp_N), torch.zeros_like(policy_N)
    if micro.logp_rollout_N is not None:
        # logp_old: with the weights before the step's first update, which are those that the sampler had
        logp_sampled_N = logp_N if micro.logp_old_N is None else micro.logp_old_N
        gap_N, compared_N = torch.where(policy_N > 0, micro.logp_rollout_N - logp_sampled_N, 0.0), policy_N
    ratio_N = torch.zeros_like(gap_N) if importance_cap is None else (-gap_N).exp() * compared_N
    truncated_N = ratio_N.clamp(max=importance_cap or math.inf)
    sums = {
        "rollout_tokens": compared_N.sum(),
        "mismatch": gap_N.abs().sum(),
        "mismatch_kl": gap_N.sum(),
        "importance": truncated_N.sum(),
        "importance_squared": truncated_N.square().sum(),
        "importance_truncated": (truncated_N < ratio_N).sum(),
    }
    return sums, gap_N.abs().amax() if gap_N.numel() else gap_N.new_zeros(())


def whole_sequences(stats: Sequence[MicroBatchStats], layout: Layout) -> list[MicroBatchStats]:
    """The stats with the KL terms and log-probs of whole sequences, whose tokens are on several ranks under context
    parallelism. A collective over the cp group; sums_M stay this rank's."""
    if layout.cp == 1:
        return list(stats)
    sums = iter(sum_over_tokens([x for s in stats for x in (s.kl_B, s.kl_tokens_B, s.logp_N)], layout))
    return [replace(s, kl_B=next(sums), kl_tokens_B=next(sums), logp_N=next(sums)) for s in stats]


def reduce_stats(
    stats: Sequence[MicroBatchStats],
    group: dist.ProcessGroup | None,
    *,
    train_tflop: float,
    terms: Sequence[str] = (),
) -> tuple[dict[str, float], list[tuple[list[float], list[float]]]]:
    """Metrics of the updates behind `stats`, over all ranks of `group`: means per token (nats); counts, losses and
    `train_tflop` (this rank's useful work) are sums. terms: names of further KL terms, those of all ranks. And kl_B and
    kl_tokens_B of each micro-batch of this rank. All is read at once: the host waits for the device once a step."""
    sums = torch.stack([s.sums_M for s in stats]).sum(0)
    further = [s.terms_3.get(name, sums.new_zeros(3)) for name in terms for s in stats]
    further = [torch.stack(further[i : i + len(stats)]).sum(0) for i in range(0, len(further), len(stats))]
    sums = torch.cat([sums, sums.new_full((1,), train_tflop), *further])
    mismatch_max = torch.stack([s.mismatch_max for s in stats]).amax(0)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(mismatch_max, op=dist.ReduceOp.MAX, group=group)
    parts = [sums, mismatch_max[None], *(x for s in stats for x in (s.kl_B, s.kl_tokens_B))]
    values = iter(torch.cat([part.double() for part in parts]).tolist())
    numbers, [mismatch_max], *kl = ([next(values) for _ in range(len(part))] for part in parts)
    own = len(SUM_NAMES) + 1
    metrics = _means(numbers[:own], mismatch_max) | _further_means(numbers[own:], terms)
    return metrics, list(zip(kl[::2], kl[1::2], strict=True))


def _further_means(numbers: Sequence[float], terms: Sequence[str]) -> dict[str, float]:
    """NAME_kl, nats a token, and NAME_loss of each further term that a token had."""
    metrics: dict[str, float] = {}
    for index, name in enumerate(terms):
        total, tokens, loss = numbers[3 * index : 3 * index + 3]
        if tokens:
            metrics |= {f"{name}_kl": total / tokens, f"{name}_loss": loss}
    return metrics


def _means(numbers: Sequence[float], mismatch_max: float) -> dict[str, float]:
    """Metrics from the step's sums."""
    total = dict(zip((*SUM_NAMES, "train_tflop"), numbers, strict=True))
    metrics = {key: total[key] for key in ("loss", "pg_loss", "kl_loss", "train_tflop", "gradient_tokens")}
    if total["policy_tokens"]:  # none where a full-vocabulary divergence is the only term
        for key in ("nll", "entropy", "clip_fraction_low", "clip_fraction_high"):
            metrics[key] = total[key] / total["policy_tokens"]
    if total["kl_tokens"]:
        metrics["kl_teacher"] = total["kl_teacher"] / total["kl_tokens"]
        metrics["kl_clamped"] = total["kl_clamped"] / total["kl_tokens"]
        metrics["kl_tokens"] = total["kl_tokens"]
    if total["rollout_tokens"]:
        metrics["mismatch_mean"] = total["mismatch"] / total["rollout_tokens"]
        metrics["mismatch_max"] = mismatch_max
        metrics["mismatch_kl"] = total["mismatch_kl"] / total["rollout_tokens"]
    if total["importance"]:  # Kish's effective sample size, as a share of the tokens
        metrics["importance_truncated"] = total["importance_truncated"] / total["rollout_tokens"]
        metrics["effective_sample_size"] = total["importance"] ** 2 / (
            total["rollout_tokens"] * total["importance_squared"]
        )
    return metrics


def mean_kl(
    micro_batches: Sequence[MicroBatch], kl_BB: Sequence[tuple[list[float], list[float]]], group: dist.ProcessGroup
) -> dict[int, float]:
    """Sample index -> mean KL term over its tokens (k2: 1/2 (logp - logp_teacher)^2), for the samples of all ranks of
    `group` that had one. kl_BB: kl_B and kl_tokens_B of each micro-batch."""
    means: dict[int, float] = {}
    for micro, (total_B, tokens_B) in zip(micro_batches, kl_BB, strict=True):
        for sample, total, count in zip(micro.sample_B, total_B, tokens_B, strict=True):
            if count:
                means[sample] = total / count
    return _merge_ranks(means, group)


def token_logps(
    micro_batches: Sequence[MicroBatch],
    stats: Sequence[MicroBatchStats],
    sample_ids: Container[int],
    group: dist.ProcessGroup,
) -> dict[int, dict[str, list[float]]]:
    """Sample index -> `logp` and, with a KL term, `logp_teacher` of its tokens (nats), for the samples of all ranks of
    `group` that are among `sample_ids`. The host waits once for each micro-batch that has one of them."""
    logps: dict[int, dict[str, list[float]]] = {}
    for micro, s in zip(micro_batches, stats, strict=True):
        if not any(sample in sample_ids for sample in micro.sample_B):
            continue
        has_teacher = micro.logp_teacher_N is not None
        teacher_N = torch.zeros_like(s.logp_N) if micro.logp_teacher_N is None else micro.logp_teacher_N.to(s.logp_N)
        rows_3N = torch.stack([s.logp_N, teacher_N, (micro.kl_weight_N != 0).to(s.logp_N)]).cpu()
        for sample, (logp_L, logp_teacher_L, has_kl_L) in by_sample(micro, rows_3N).items():
            if sample in sample_ids:
                logps[sample] = {"logp": logp_L.tolist()}
                if has_teacher and has_kl_L.any():
                    logps[sample]["logp_teacher"] = logp_teacher_L.tolist()
    return _merge_ranks(logps, group)


def by_sample(micro: MicroBatch, values_N: Tensor) -> dict[int, Tensor]:
    """Sample index -> the values [..., L] of its tokens, which lie side by side in a micro-batch's [..., N]."""
    lengths = [len(sample.response_ids) for sample in micro.samples_B]
    return dict(zip(micro.sample_B, values_N.split(lengths, dim=-1), strict=True))


def _merge_ranks(by_sample: dict[int, ValueT], group: dist.ProcessGroup) -> dict[int, ValueT]:
    if dist.get_world_size(group) == 1:  # through NCCL objects travel by the device
        return by_sample
    shares: list[dict[int, ValueT]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(shares, by_sample, group=group)
    return {sample: value for share in shares for sample, value in share.items()}
