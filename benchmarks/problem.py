"""The problem that every provider solves, with the fp64 result on a subset of rows and columns.

    mode      constant        task
    forward   LOGPROB         log-prob of each target
    full      POLICY_LOSS     the clipped policy gradient with one coefficient per token, forward and backward
    ce        CROSS_ENTROPY   mean cross entropy, forward and backward (all that QuACK and some others compute)

The distillation term has weight 0 here, since Liger's GRPO loss knows k3 only; it is a per-token term and costs nothing
next to the matmuls. Logits have standard deviation 3; every fourth token is confident. Targets are sampled from the
softmax. Ratios come from a list that stays away from both clip edges, so that rounding cannot change a branch.

Shape letters: N tokens, C tokens of a chunk, D hidden, V vocabulary, r checked rows, c checked columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LOGPROB, POLICY_LOSS, CROSS_ENTROPY = "forward", "full", "ce"  # as in the CSV files
CLIP_EPS_LOW, CLIP_EPS_HIGH = 0.2, 0.3
LOG_RATIOS = (-0.5, -0.1, 0.0, 0.1, 0.5)
CHECKED_ROWS, CHECKED_COLUMNS = 256, 512
# Allows rounding only; beyond it the provider computes something else. tests/kernels has far tighter bounds for ours.
TOLERANCE = {
    "float64": {"logp": 1e-9, "loss": 1e-9, "d_hidden": 1e-9, "d_weight": 1e-9},
    "float32": {"logp": 1e-3, "loss": 1e-4, "d_hidden": 1e-3, "d_weight": 1e-3},
    "bfloat16": {"logp": 1e-1, "loss": 3e-2, "d_hidden": 3e-2, "d_weight": 3e-2},
}


@dataclass(frozen=True)
class Case:
    """One case of the sweep: a group of rows in the CSV."""

    head: str
    mode: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str


@dataclass(frozen=True)
class Truth:
    """The result in fp64."""

    logp_N: Tensor
    d_logp_N: Tensor
    loss: Tensor
    scale: Tensor
    """Mean |term of the loss|, the scale of its error (the terms themselves may cancel)."""
    rows_r: Tensor
    columns_c: Tensor
    d_hidden_rD: Tensor
    d_weight_cD: Tensor


@dataclass(frozen=True)
class Problem:
    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    logp_old_N: Tensor
    advantage_N: Tensor
    truth: Truth

    def save(self, path: Path) -> None:
        torch.save({**vars(self), "truth": vars(self.truth)}, path)

    @staticmethod
    def load(path: Path, device: torch.device, *, gradients: bool) -> Problem:
        fields = torch.load(path, map_location=device, weights_only=True)
        problem = Problem(**(fields | {"truth": Truth(**fields["truth"])}))
        for leaf in (problem.hidden_ND, problem.weight_VD):
            leaf.requires_grad_(gradients)
        return problem


def policy_loss(logp_N: Tensor, logp_old_N: Tensor, advantage_N: Tensor) -> Tensor:
    """Mean clipped surrogate, for every provider that computes log-probs only."""
    ratio_N = (logp_N - logp_old_N).exp()
    clipped_N = ratio_N.clamp(1 - CLIP_EPS_LOW, 1 + CLIP_EPS_HIGH)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N).mean()


def make_problem(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight_VD = draw(case.vocab, case.hidden) * 3 / case.hidden**0.5
    hidden_ND = draw(case.tokens, case.hidden)
    spike_D = weight_VD[min(7, case.vocab - 1)]
    hidden_ND[::4] += 20 * spike_D / spike_D.square().sum()
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    u_N = torch.rand(case.tokens, generator=generator, device=device, dtype=torch.float64)
    logp_N, log_total_N, target_N = _sample(hidden_ND, weight_VD, u_N)
    choice_N = torch.randint(len(LOG_RATIOS), (case.tokens,), generator=generator, device=device)
    log_ratio_N = torch.tensor(LOG_RATIOS, device=device, dtype=torch.float64)[choice_N]
    logp_old_N = (logp_N - log_ratio_N).float()
    advantage_N = draw(case.tokens)
    truth = _truth(case, hidden_ND, weight_VD, target_N, (logp_N, log_total_N, logp_old_N, advantage_N), generator)
    return Problem(hidden_ND, weight_VD, target_N, logp_old_N, advantage_N, truth)


def _sample(hidden_ND: Tensor, weight_VD: Tensor, u_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, target) in fp64, the target drawn by inverting the softmax's distribution at u."""
    weight_DV = weight_VD.double().t()
    parts = []
    for first in range(0, len(u_N), 128):
        z_CV = hidden_ND[first : first + 128].double() @ weight_DV
        log_total_C = z_CV.logsumexp(dim=1)
        below_CV = (z_CV - log_total_C[:, None]).exp_().cumsum_(dim=1)
        target_C = torch.searchsorted(below_CV, u_N[first : first + 128, None])[:, 0].clamp_(max=z_CV.shape[1] - 1)
        parts.append((z_CV.gather(1, target_C[:, None])[:, 0] - log_total_C, log_total_C, target_C))
    logp_N, log_total_N, target_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp_N, log_total_N, target_N


def _truth(
    case: Case,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    per_token: tuple[Tensor, Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> Truth:
    logp_N, log_total_N, logp_old_N, advantage_N = per_token
    leaf_N = logp_N.clone().requires_grad_()
    is_ce = case.mode == CROSS_ENTROPY
    loss = -leaf_N.mean() if is_ce else policy_loss(leaf_N, logp_old_N.double(), advantage_N.double())
    (d_logp_N,) = torch.autograd.grad(loss, leaf_N)
    scale = (logp_N if is_ce else (logp_N - logp_old_N).exp() * advantage_N).abs().mean()

    def sample_indices(limit: int, count: int) -> Tensor:
        return torch.randperm(limit, generator=generator, device=target_N.device)[:count]

    rows_r = sample_indices(case.tokens, CHECKED_ROWS)
    columns_c = torch.cat((target_N[: CHECKED_COLUMNS // 2], sample_indices(case.vocab, CHECKED_COLUMNS // 2))).unique()
    p_rV = (hidden_ND[rows_r].double() @ weight_VD.double().t() - log_total_N[rows_r, None]).exp_()
    d_hidden_rD = weight_VD[target_N[rows_r]].double() - p_rV @ weight_VD.double()
    p_Nc = (hidden_ND.double() @ weight_VD[columns_c].double().t() - log_total_N[:, None]).exp_()
    d_z_Nc = d_logp_N[:, None] * ((target_N[:, None] == columns_c).double() - p_Nc)
    return Truth(
        logp_N=logp_N,
        d_logp_N=d_logp_N,
        loss=loss.detach(),
        scale=scale,
        rows_r=rows_r,
        columns_c=columns_c,
        d_hidden_rD=d_logp_N[rows_r, None] * d_hidden_rD,
        d_weight_cD=d_z_Nc.t() @ hidden_ND.double(),
    )


def errors(problem: Problem, answer: Tensor) -> dict[str, float]:
    """Errors against fp64: the largest of log-probs (nats), or those of loss and gradients (relative, Frobenius)."""
    truth = problem.truth
    if answer.ndim:
        return {"logp": float((answer.double() - truth.logp_N).abs().max())}
    d_hidden_rD, d_weight_cD = problem.hidden_ND.grad[truth.rows_r], problem.weight_VD.grad[truth.columns_c]
    return {
        "loss": float((answer.double() - truth.loss).abs() / truth.scale),
        "d_hidden": _relative(d_hidden_rD, truth.d_hidden_rD),
        "d_weight": _relative(d_weight_cD, truth.d_weight_cD),
    }


def disagreement(case: Case, measured: dict[str, float]) -> str:
    """The errors beyond rounding, as text; empty where there are none."""
    over = [f"{k} off by {v:.1e}" for k, v in measured.items() if not v <= TOLERANCE[case.dtype][k]]
    return ", ".join(over)


def _relative(measured: Tensor, truth: Tensor) -> float:
    return float((measured.double() - truth).norm() / truth.norm())
