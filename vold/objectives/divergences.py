"""Divergences between student and teacher that are losses on the student's own samples, and estimators that are not.

With gap = logp - logp_teacher of a sampled token, the estimators of KL(student || teacher) are k1 = gap,
k2 = 1/2 gap^2, k3 = exp(-gap) - 1 + gap. As *values* all three estimate it (k2 with a bias); what trains is the
gradient, and on-policy E[grad k1] = 0, E[grad k2] = grad KL(S || T), E[grad k3] = grad KL(T || S)
(tests/objectives/test_methods.py computes all three).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vold.types import DistributionTerm, MicroBatch


@dataclass(frozen=True)
class VocabularyDivergence:
    """A divergence between the two distributions over the vocabulary at each token, computed by
    `vold_kernels.linear_kl`.

    name        reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); jsd
    alpha       weight of the teacher in jsd's mixture
    top_k       the student's most probable ids are compared one by one, all others as one; None: every id
    ratio_cap   with several updates a step, a token's divergence is multiplied by min(pi / pi_old, ratio_cap) (SDPO)
    """

    name: str
    alpha: float = 0.5
    top_k: int | None = None
    ratio_cap: float = 2.0

    def options(self) -> dict[str, Any]:
        """The keywords of `linear_kl`."""
        return {"divergence": self.name, "alpha": self.alpha, "top_k": self.top_k}

    def term(self, name: str, micro: MicroBatch) -> DistributionTerm | None:
        """The term of a micro-batch whose teacher has scored it, by whole distributions or its own most probable ids;
        None where it has nothing to score."""
        options = self.options()
        if micro.hidden_teacher_nE is not None and micro.head_teacher_UE is not None:
            rows = (micro.hidden_teacher_nE, micro.head_teacher_UE)
            return DistributionTerm(name, micro.kl_weight_N, rows, options, self.ratio_cap)
        if micro.top_teacher is not None:
            del options["top_k"]
            return DistributionTerm(name, micro.kl_weight_N, micro.top_teacher, options, self.ratio_cap, is_top=True)
        return None


DIVERGENCES: dict[str, VocabularyDivergence | None] = {
    "k2": None,
    "reverse_kl": VocabularyDivergence("reverse_kl"),
    "forward_kl": VocabularyDivergence("forward_kl"),
    "jsd": VocabularyDivergence("jsd"),
}
"""None: k2 of the sampled tokens, which needs the teacher's log-probs of those tokens alone."""

REFERENCE_DIVERGENCES: dict[str, VocabularyDivergence | None] = {
    "k3": None,
    **{name: divergence for name, divergence in DIVERGENCES.items() if divergence},
}
"""Of the term towards a frozen reference. None: k3 of the sampled tokens, GRPO's (arXiv 2402.03300, Eq. 4)."""

REFUSED = {
    "k1": "as a direct loss its expected gradient is 0, whatever the teacher says; k2 has the gradient of "
    "KL(student || teacher)",
    "k3": "as a direct loss its expected gradient is that of KL(teacher || student), not of KL(student || teacher); "
    "k2 has the latter, and forward_kl is the former without noise",
}


def build_divergence(name: str) -> VocabularyDivergence | None:
    """The divergence of that name. Raises ValueError, with the reason, for an estimator whose gradient is not that of
    its divergence."""
    if name in REFUSED:
        raise ValueError(f"objective.divergence = {name!r}: {REFUSED[name]}; set objective.divergence: k2")
    return DIVERGENCES[name]
