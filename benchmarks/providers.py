"""The providers that are timed, ours and peers: one function each, behind the same interface.

`PROVIDERS[name].load(case)` imports the peer and returns `step(problem)`, which returns log-probs [N] in mode LOGPROB
and a scalar loss otherwise. `unavailable_reason`, or the error that load or step raises, is the reason in the row of a
provider that is not available. For peers that compute log-probs only, the loss is that of `problem.py` (`_with`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import CLIP_EPS_HIGH, CLIP_EPS_LOW, CROSS_ENTROPY, LOGPROB, POLICY_LOSS, Case, Problem, policy_loss

Step = Callable[[Problem], Tensor]
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]
FLOOR = "matmuls alone"
OURS = "vold_kernels"


@dataclass(frozen=True)
class Provider:
    load: Callable[[Case], Step]
    package: str
    """The package whose version is in the row."""
    modes: tuple[str, ...] = (POLICY_LOSS, LOGPROB, CROSS_ENTROPY)
    other_modes_reason: str = ""
    """Why the other modes are not available."""
    needs_gpu: bool = False

    def unavailable_reason(self, case: Case, device: torch.device) -> str:
        """Why it cannot run, as far as is known without importing it; empty where it may."""
        if case.mode not in self.modes:
            return self.other_modes_reason
        return "needs a GPU" if self.needs_gpu and device.type != "cuda" else ""


def ours(case: Case) -> Step:
    from vold_kernels import PolicyTerms, linear_logprob, linear_policy_loss

    def logprob(p: Problem) -> Tensor:
        return linear_logprob(p.hidden_ND, p.weight_VD, p.target_N)

    def loss(p: Problem) -> Tensor:
        ones_N = torch.full_like(p.advantage_N, 1 / len(p.advantage_N))
        if case.mode == CROSS_ENTROPY:  # on policy and with advantage 1 the gradient is that of the cross entropy
            terms = PolicyTerms(None, None, torch.ones_like(ones_N), ones_N, torch.zeros_like(ones_N))
            out = linear_policy_loss(
                p.hidden_ND, p.weight_VD, p.target_N, terms, clip_eps_low=CLIP_EPS_LOW, clip_eps_high=CLIP_EPS_HIGH
            )
            return out.loss - out.loss.detach() - out.logp_N.mean()
        terms = PolicyTerms(p.logp_old_N, None, p.advantage_N, ones_N, torch.zeros_like(ones_N))
        return linear_policy_loss(
            p.hidden_ND, p.weight_VD, p.target_N, terms, clip_eps_low=CLIP_EPS_LOW, clip_eps_high=CLIP_EPS_HIGH
        ).loss

    return logprob if case.mode == LOGPROB else loss


def eager(case: Case) -> Step:
    return _with(_materialised, case)


def compiled(case: Case) -> Step:
    return torch.compile(_with(_materialised, case), dynamic=False)


def trl(case: Case) -> Step:
    _stub("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # 32768 columns and no optional outputs: TRL's trainer default, and the least work it can do
    return _with(lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0], case)


def liger_grpo(case: Case) -> Step:
    """Each token is a sequence of length 1 in one chunk: the only layout with per-token advantages, and the fastest."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,  # the per-token maths only: [N, 1]
        use_ref_model=False,
        chunk_size=case.tokens,
        epsilon_low=CLIP_EPS_LOW,
        epsilon_high=CLIP_EPS_HIGH,
        loss_type="dapo",
    )

    def step(p: Problem) -> Tensor:
        mask_N1 = torch.ones_like(p.target_N)[:, None]
        hidden_N1D, target_N1 = p.hidden_ND[:, None], p.target_N[:, None]
        return loss(
            hidden_N1D, p.weight_VD, target_N1, mask_N1, p.advantage_N, old_per_token_logps=p.logp_old_N[:, None]
        )[0]

    return step


def liger_scaled_ce(case: Case) -> Step:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return _with(lambda h, w, y: -Scaled.apply(h, w, y, 1.0), case)


def liger_ce(case: Case) -> Step:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    def loss(h: Tensor, w: Tensor, y: Tensor, reduction: str) -> Tensor:
        return Fused.apply(h, w, y, None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)[0]

    if case.mode == CROSS_ENTROPY:
        return lambda p: loss(p.hidden_ND, p.weight_VD, p.target_N, "mean")
    return _with(lambda h, w, y: -loss(h, w, y, "none"), case)


def cut_cross_entropy(case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    return _with(lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", filter_eps=None).float(), case)


def verl(case: Case) -> Step:
    """Imports the two kernel files only: the package itself imports ray."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'verl'")
    root = Path(spec.origin).parent
    for name, folder in (("verl", root), ("verl.utils", root / "utils"), ("verl.utils.kernel", root / "utils/kernel")):
        _stub(name, __path__=[str(folder)])
    _stub(
        "verl.utils.device",
        is_cuda_available=True,
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
    )
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return _with(lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none", None)[0], case)


def quack(case: Case) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: chunked_linear_cross_entropy(p.hidden_ND, p.weight_VD, p.target_N, chunk_size=4096)


def floor(case: Case) -> Step:
    """The matmuls of the mode alone, in the chunking that is fastest here: a lower bound of the time.

    Outputs have the inputs' dtype and reused storage. 2NDV forward, 6NDV otherwise.
    """
    chosen: list[tuple[int, int]] = []

    def step(p: Problem) -> Tensor:
        if not chosen:
            chosen.append(_fastest_chunking(p, full=case.mode != LOGPROB))
        return _matmuls(p, *chosen[0], full=case.mode != LOGPROB)

    return step


PROVIDERS = {
    FLOOR: Provider(floor, "torch"),
    OURS: Provider(ours, "vold"),
    "eager": Provider(eager, "torch"),
    "torch.compile": Provider(compiled, "torch"),
    "Liger GRPO": Provider(
        liger_grpo, "liger-kernel", modes=(POLICY_LOSS,), other_modes_reason="gives the GRPO loss only"
    ),
    "Liger scaled CE": Provider(liger_scaled_ce, "liger-kernel"),
    "Liger CE": Provider(liger_ce, "liger-kernel", needs_gpu=True),
    "TRL chunked": Provider(trl, "trl"),
    "cut-cross-entropy": Provider(cut_cross_entropy, "cut-cross-entropy", needs_gpu=True),
    "verl": Provider(verl, "verl", needs_gpu=True),
    "QuACK": Provider(
        quack,
        "quack-kernels",
        modes=(CROSS_ENTROPY,),
        other_modes_reason="mean or sum cross entropy only, no coefficient of a token's own",
        needs_gpu=True,
    ),
}


def _materialised(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return -F.cross_entropy((hidden_ND @ weight_VD.T).float(), target_N, reduction="none")


def _with(logprob: Logprob, case: Case) -> Step:
    """A log-prob is a provider of every mode."""

    def forward(p: Problem) -> Tensor:
        return logprob(p.hidden_ND, p.weight_VD, p.target_N)

    def full(p: Problem) -> Tensor:
        return policy_loss(forward(p), p.logp_old_N, p.advantage_N)

    def ce(p: Problem) -> Tensor:
        return -forward(p).mean()

    return {LOGPROB: forward, POLICY_LOSS: full, CROSS_ENTROPY: ce}[case.mode]


def _stub(name: str, **attributes: object) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _fastest_chunking(p: Problem, *, full: bool) -> tuple[int, int]:
    """(tokens, columns) of one chunk. One timed chunk each, by the time per element."""
    from .harness import seconds

    tokens, columns = len(p.target_N), len(p.weight_VD)
    options = {(min(c, tokens), min(v, columns)) for c in (256, 1024, 4096) for v in (8192, columns)}

    def per_element(option: tuple[int, int]) -> float:
        part = Problem(
            p.hidden_ND[: option[0]], p.weight_VD[: option[1]], p.target_N, p.logp_old_N, p.advantage_N, p.truth
        )
        best = min(seconds(lambda: _matmuls(part, *option, full=full), p.hidden_ND.device) for _ in range(3))
        return best / (option[0] * option[1])

    return min(sorted(options), key=per_element)


@torch.no_grad()
def _matmuls(p: Problem, tokens: int, columns: int, *, full: bool) -> Tensor:
    hidden_ND, weight_VD = p.hidden_ND, p.weight_VD
    buffer = hidden_ND.new_empty(tokens * columns)
    d_hidden_ND = torch.zeros_like(hidden_ND) if full else None
    d_weight_VD = torch.zeros_like(weight_VD) if full else None
    for n in range(0, len(hidden_ND), tokens):
        hidden_CD = hidden_ND[n : n + tokens]
        for v in range(0, len(weight_VD), columns):
            weight_BD = weight_VD[v : v + columns]
            z_CB = buffer[: len(hidden_CD) * len(weight_BD)].view(len(hidden_CD), len(weight_BD))
            torch.mm(hidden_CD, weight_BD.t(), out=z_CB)
            if full:
                d_hidden_ND[n : n + tokens].addmm_(z_CB, weight_BD)
                d_weight_VD[v : v + columns].addmm_(z_CB.t(), hidden_CD)
    return buffer[0]
