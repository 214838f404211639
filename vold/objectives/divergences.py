"""Divergences from the teacher that can be a loss on the student's own samples, and why others cannot.

With gap = logp - logp_teacher of a sampled token, the estimators of KL(student || teacher) are k1 = gap,
k2 = 1/2 gap^2, k3 = exp(-gap) - 1 + gap. As *values* all three estimate it (k2 with a bias); what trains is the
gradient, and on-policy E[grad k1] = 0, E[grad k2] = grad KL(S || T), E[grad k3] = grad KL(T || S)
(tests/objectives/test_divergences.py computes all three).
"""

from __future__ import annotations

REFUSED = {
    "k1": "as a direct loss its expected gradient is 0, whatever the teacher says; k2 has the gradient of "
    "KL(student || teacher)",
    "k3": "as a direct loss its expected gradient is that of KL(teacher || student), not of KL(student || teacher); "
    "k2 has the latter",
    "full": "the trainer's loss reads the teacher's log-prob of the sampled token, not its whole distribution; k2 is "
    "its estimate on samples (vold_kernels.linear_kl computes the full divergence from two heads)",
}


def check_divergence(name: str) -> None:
    """Raises ValueError, with the reason, for a divergence whose gradient is not that of KL(student || teacher)."""
    if name in REFUSED:
        raise ValueError(f"objective.divergence = {name!r}: {REFUSED[name]}; set objective.divergence: k2")
