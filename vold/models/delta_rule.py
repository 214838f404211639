"""The gated delta rule (arXiv 2412.06464) over packed runs of tokens. With a key k and a value v of each token,

    S_t = exp(decay_t) S_{t-1} (1 - β_t k_t k_tᵀ) + β_t v_t k_tᵀ          out_t = S_t q_t / sqrt(H)

q and k of length 1. `recurrent_delta_rule` is that, a token at a time: the specification. `torch_delta_rule` computes
the same in chunks of tokens by matrix products, as transformers does, for runs of any length side by side;
`fla_delta_rule` by flash-linear-attention's kernels.

T tokens, K key heads, A value heads (each key head serves A / K of them), H width of a key, W width of a value,
R runs, n chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vold.models.runs import RunLengths

NORM_EPS = 1e-6


def recurrent_delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], decay_TA: Tensor, beta_TA: Tensor, start_RAHW: Tensor | None, runs: RunLengths
) -> tuple[Tensor, Tensor]:
    """See torch_delta_rule."""
    q_TAH, k_TAH, v_TAW = _widened(*qkv)
    decay_TA, beta_TA = decay_TA.to(v_TAW.dtype), beta_TA.to(v_TAW.dtype)
    outs, ends = [], []
    for number, (first, last) in enumerate(runs.host_bounds.unfold(0, 2, 1).tolist()):
        state_AHW = v_TAW.new_zeros(*k_TAH.shape[1:], v_TAW.shape[2]) if start_RAHW is None else start_RAHW[number]
        for t in range(first, last):
            state_AHW = state_AHW * decay_TA[t].exp()[:, None, None]
            known_AW = torch.einsum("ahw,ah->aw", state_AHW, k_TAH[t])
            change_AW = beta_TA[t, :, None] * (v_TAW[t] - known_AW)
            state_AHW = state_AHW + torch.einsum("ah,aw->ahw", k_TAH[t], change_AW)
            outs.append(torch.einsum("ahw,ah->aw", state_AHW, q_TAH[t]))
        ends.append(state_AHW)
    return torch.stack(outs).to(qkv[2].dtype), torch.stack(ends)


def torch_delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], decay_TA: Tensor, beta_TA: Tensor, start_RAHW: Tensor | None, runs: RunLengths
) -> tuple[Tensor, Tensor]:
    """(out [T, A, W] in the dtype of v, the state at the end of each run [R, A, H, W], fp32).

    qkv: q and k [T, K, H], v [T, A, W]. decay: logarithms, at most 0. beta: within 0 and 1. start: the state before
    each run; None: zeros. runs: of these T tokens."""
    q_TAH, k_TAH, v_TAW = _widened(*qkv)
    chunks = runs.chunks

    def cut(x_TAx: Tensor) -> Tensor:
        """[T, A, ...] -> [n, A, C, ...], zeros behind the end of a run, which change no state."""
        padded = torch.cat([x_TAx, x_TAx.new_zeros(1, *x_TAx.shape[1:])])
        return padded[chunks.token_nC].transpose(1, 2)

    q_nACH, k_nACH, v_nACW = map(cut, (q_TAH, k_TAH, v_TAW))
    decay_nAC, beta_nAC1 = cut(decay_TA.to(v_TAW.dtype)).cumsum(-1), cut(beta_TA.to(v_TAW.dtype))[..., None]
    later = torch.ones(decay_nAC.shape[-1], decay_nAC.shape[-1], dtype=torch.bool, device=v_TAW.device).triu(1)
    between_nACC = (decay_nAC[..., :, None] - decay_nAC[..., None, :]).masked_fill(later, -torch.inf).exp()
    since_nAC1 = decay_nAC.exp()[..., None]  # since the chunk's begin
    # What each token changes, as if the chunk began with a state of zeros, and what it finds in the state there: a
    # triangular system, since a token sees what those before it have changed (the UT transform).
    system_nACC = (beta_nAC1 * k_nACH) @ k_nACH.mT * between_nACC
    right = torch.cat([beta_nAC1 * v_nACW, beta_nAC1 * since_nAC1 * k_nACH], dim=-1)
    solved = torch.linalg.solve_triangular(system_nACC, right, upper=False, unitriangular=True)
    change_nACW, found_nACH = solved.split([v_nACW.shape[-1], k_nACH.shape[-1]], dim=-1)
    within_nACC = q_nACH @ k_nACH.mT * between_nACC
    total_nA11 = decay_nAC[..., -1:, None]
    parts = (since_nAC1 * q_nACH, within_nACC, change_nACW, found_nACH)
    left_nACH = k_nACH * (total_nA11 - decay_nAC[..., None]).exp()
    if start_RAHW is None:
        start_RAHW = v_TAW.new_zeros(len(runs.lengths), *k_TAH.shape[1:], v_TAW.shape[2])
    out_nACW, end_RAHW = _scan(parts, left_nACH, total_nA11.exp(), start_RAHW, chunks.counts)
    out_TAW = out_nACW.transpose(1, 2).flatten(0, 1)[chunks.place_T]
    return out_TAW.to(qkv[2].dtype), end_RAHW


def _scan(
    parts: tuple[Tensor, ...], left_nACH: Tensor, total_nA11: Tensor, state_RAHW: Tensor, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Chunk after chunk of all runs; a run that has ended leaves."""
    outs, ends, at = [], [], 0
    for count, following in zip(counts, (*counts[1:], 0), strict=True):
        rows, at = slice(at, at + count), at + count
        q, within, change, found = (part[rows] for part in parts)
        change = change - found @ state_RAHW
        outs.append(q @ state_RAHW + within @ change)
        state_RAHW = state_RAHW * total_nA11[rows] + left_nACH[rows].mT @ change
        ends.append(state_RAHW[following:])
        state_RAHW = state_RAHW[:following]
    return torch.cat(outs), torch.cat(ends[::-1])


def _widened(q_TKH: Tensor, k_TKH: Tensor, v_TAW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 at least: q and k of length 1, q scaled, both for each value head."""
    copies, dtype = v_TAW.shape[1] // k_TKH.shape[1], torch.promote_types(v_TAW.dtype, torch.float32)
    q_TKH, k_TKH = (x.to(dtype) for x in (q_TKH, k_TKH))
    q_TKH, k_TKH = (x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for x in (q_TKH, k_TKH))
    q_TKH = q_TKH * q_TKH.shape[-1] ** -0.5
    return q_TKH.repeat_interleave(copies, 1), k_TKH.repeat_interleave(copies, 1), v_TAW.to(dtype)


def fla_delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], decay_TA: Tensor, beta_TA: Tensor, start_RAHW: Tensor | None, runs: RunLengths
) -> tuple[Tensor, Tensor]:
    """See torch_delta_rule; flash-linear-attention 0.6 or later, on CUDA alone."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, decay, beta = (x[None] for x in (*qkv, decay_TA, beta_TA))
    out, end_RAHW = chunk_gated_delta_rule(
        *(q, k, v, decay, beta),
        initial_state=start_RAHW,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=runs.bounds,
        cu_seqlens_cpu=runs.host_bounds,
    )
    return out[0], end_RAHW


def causal_convolution(x_TD: Tensor, weight_D1C: Tensor, windows: tuple[Tensor, Tensor]) -> Tensor:
    """[T, D] -> the same, in the order of the runs: each column with the C - 1 rows before it in its sequence. windows:
    of Runs.windows(C)."""
    token_S, begin_T = windows
    seen_SD = F.embedding(token_S, torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])]))
    out_DS = F.conv1d(seen_SD.T[None], weight_D1C, groups=x_TD.shape[1])[0]
    return out_DS.T[begin_T]
