"""Divergences from the teacher that can be a loss on the student's own samples, and why others cannot.

With gap = logp - logp_teacher of a sampled token, the estimators of KL(student || teacher) are k1 = gap,
k2 = 1/2 gap^2, k3 = exp(-gap) - 1 + gap. As *values* all three estimate it (k2 with a bias); what trains is the
gradient, and on-policy E[grad k1] = 0, E[grad k2] = grad KL(S || T), E[grad k3] = grad KL(T || S)
(tests/objectives/test_methods.py computes all three).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FullDivergence:
    """Of two whole distributions at each token, by `vold_kernels.linear_kl`, which says what `kind` and `alpha` are.

    top_k: the student's likeliest ids one by one, all others as one; None: each id. ratio_cap: where a step has several
    updates, a token's divergence counts pi / pi_old times, at most this often (SDPO)."""

    kind: str
    alpha: float = 0.5
    top_k: int | None = None
    ratio_cap: float = 2.0


DIVERGENCES: dict[str, FullDivergence | None] = {
    "k2": None,
    "reverse_kl": FullDivergence("reverse_kl"),
    "forward_kl": FullDivergence("forward_kl"),
    "jsd": FullDivergence("jsd"),
}
"""None: k2 of the sampled tokens, which needs the teacher's log-probs alone."""

REFUSED = {
    "k1": "as a direct loss its expected gradient is 0, whatever the teacher says; k2 has the gradient of "
    "KL(student || teacher)",
    "k3": "as a direct loss its expected gradient is that of KL(teacher || student), not of KL(student || teacher); "
    "k2 has the latter, and forward_kl is the former without noise",
}


def build_divergence(name: str) -> FullDivergence | None:
    """Raises ValueError, with the reason, for an estimator whose gradient is not that of its divergence."""
    if name in REFUSED:
        raise ValueError(f"objective.divergence = {name!r}: {REFUSED[name]}; set objective.divergence: k2")
    return DIVERGENCES[name]
