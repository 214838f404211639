"""Shared parts of the kernel tests: problems on block edges, weights of every kind, comparisons, a recorder of ops.

Shape letters: N tokens, D hidden, V vocabulary. Runs on a GPU where there is one, else on the CPU: in plain torch, or
through the Triton interpreter when TRITON_INTERPRET=1 was set before the process started.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vold_kernels import ChunkBudget, PolicyLoss, PolicyTerms, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 4
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}


@dataclass(frozen=True)
class Problem:
    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """A copy in this dtype whose hidden and weight are new leaves."""
        hidden_ND, weight_VD = (x.detach().to(dtype).requires_grad_() for x in (self.hidden_ND, self.weight_VD))
        return Problem(hidden_ND, weight_VD, self.target_N)

    def __iter__(self):
        return iter((self.hidden_ND, self.weight_VD, self.target_N))

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_ND, self.weight_VD


def problem(tokens: int, vocab: int, *, width: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    hidden_ND, weight_VD = torch.randn(tokens, width), torch.randn(vocab, width)
    target_N = torch.randint(0, vocab, (tokens,))
    return Problem(hidden_ND.to(DEVICE), weight_VD.to(DEVICE), target_N.to(DEVICE)).to(dtype)


@dataclass(frozen=True)
class PairProblem:
    """A student's and a teacher's head of different widths. Only the student's tensors are leaves."""

    student_hidden_ND: Tensor
    student_weight_VD: Tensor
    teacher_hidden_NE: Tensor
    teacher_weight_VE: Tensor

    def to(self, dtype: torch.dtype) -> "PairProblem":
        values = [x.detach().to(dtype) for x in self]
        return PairProblem(*(x.requires_grad_() for x in values[:2]), *values[2:])

    def __iter__(self):
        return iter(vars(self).values())

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden_ND, self.student_weight_VD


def pair_problem(
    tokens: int, vocab: int, *, width: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PairProblem:
    torch.manual_seed(seed)
    student = torch.randn(tokens, width), torch.randn(vocab, width)
    teacher = torch.randn(tokens, width + 3), torch.randn(vocab, width + 3)
    return PairProblem(*(x.to(DEVICE) for x in (*student, *teacher))).to(dtype)


def token_weights(tokens: int, *, seed: int = 2) -> Tensor:
    """Of every three tokens the second has no weight; some weights are negative."""
    torch.manual_seed(seed)
    return (torch.randn(tokens, dtype=torch.float64) * (torch.arange(tokens) % 3 != 1)).to(DEVICE)


def policy_terms(case: Problem, *, temperature: float = 1.0, seed: int = 1) -> PolicyTerms:
    """Off-policy by ±0.3, so that both bounds clip; of every four tokens one has no weight, two have one weight."""
    torch.manual_seed(seed)
    with torch.no_grad():
        logp_N = reference.linear_logprob(*case.to(torch.float64), temperature=temperature)
    old, teacher, advantage, pg_weight, kl_weight = torch.randn(5, len(logp_N), dtype=torch.float64).to(DEVICE)
    kind_N = (torch.arange(len(logp_N)) % 4).to(DEVICE)
    return PolicyTerms(
        logp_old_N=logp_N + 0.3 * old,
        logp_teacher_N=logp_N + teacher,
        advantage_N=advantage,
        pg_weight_N=(pg_weight.abs() + 0.1) * ((kind_N == 0) | (kind_N == 2)),
        kl_weight_N=(kl_weight.abs() + 0.1) * ((kind_N == 0) | (kind_N == 3)),
    )


def coupled(terms: PolicyTerms) -> PolicyTerms:
    """The same tokens in sequences of 3 (the last may be shorter)."""
    return replace(terms, sequence_N=torch.arange(len(terms.advantage_N), device=DEVICE) // 3)


def bounded(terms: PolicyTerms) -> PolicyTerms:
    """Bounds of the ratio that differ from token to token."""
    low_N, high_N = torch.rand(2, len(terms.advantage_N), dtype=torch.float64, device=DEVICE)
    return replace(terms, ratio_low_N=0.5 + 0.4 * low_N, ratio_high_N=1.05 + 0.5 * high_N)


def small_chunks(vocab: int, *, itemsize: int = 8, tokens: int = CHUNK, columns: int = 16) -> ChunkBudget:
    """`tokens` rows resident, tiles of tokens − 1 rows × `columns`."""
    tile = max(tokens - 1, 1) * min(columns, vocab) * itemsize
    return ChunkBudget(resident_bytes=tokens * vocab * itemsize, tile_bytes=tile, tile_columns=columns)


def with_fields(terms: PolicyTerms, rows: Tensor | slice, **values: float) -> PolicyTerms:
    changed = {}
    for name, value in values.items():
        changed[name] = getattr(terms, name).clone()
        changed[name][rows] = value
    return replace(terms, **changed)


def gradients(loss: Tensor, case: Problem | PairProblem) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, case.leaves)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, which must not be zero."""
    norm = expected.double().norm().item()
    assert norm > 0, "nothing to compare with: a vacuous pass"
    return (actual.double() - expected.double()).norm().item() / norm


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """|actual − expected| ≤ tolerance · (1 + |expected|), elementwise."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
    assert error.max().item() <= tolerance, f"off by {error.max().item():.2e}, allowed {tolerance:.0e}"


def assert_same_record(actual: PolicyLoss, expected: PolicyLoss, tolerance: float) -> None:
    for name in ("loss", "logp_N", "entropy_N", "pg_loss", "kl_loss", "kl_old"):
        assert_near(getattr(actual, name), getattr(expected, name), tolerance)
    assert torch.equal(actual.clip_count_low, expected.clip_count_low) and torch.equal(
        actual.clip_count_high, expected.clip_count_high
    )


class Recorder(TorchDispatchMode):
    """Records the name of every op, and the bytes of the largest tensor that an op returned."""

    def __init__(self):
        super().__init__()
        self.largest, self.ops = 0, []

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ops.append(str(function))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.nbytes)
        return result

    @property
    def matmuls(self) -> int:
        return sum("addmm" in op or "aten.mm" in op for op in self.ops)
