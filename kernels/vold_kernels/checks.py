"""Checks of the public functions' arguments, by shapes and dtypes only: no tensor's values are read (no host sync)."""

import torch
from torch import Tensor

from .chunks import ChunkBudget
from .divergence import KINDS, Divergence
from .matmuls import accumulator_dtype
from .token_loss import SURROGATES, LossNumbers
from .types import PolicyTerms

SUPPORTED_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden_ND: Tensor, weight_UD: Tensor, *, temperature: float) -> None:
    """Raises ValueError unless hidden [N, D] and weight [V, D] agree in shape, dtype and device."""
    if hidden_ND.ndim != 2 or weight_UD.ndim != 2 or hidden_ND.shape[1] != weight_UD.shape[1] or not len(weight_UD):
        raise ValueError(
            f"hidden is {tuple(hidden_ND.shape)} and weight {tuple(weight_UD.shape)}; they must be [N, D] and [V, D] "
            "with V > 0: flatten batch and sequence, and pass the weight as nn.Linear stores it"
        )
    if hidden_ND.dtype != weight_UD.dtype or hidden_ND.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"hidden is {hidden_ND.dtype} and weight {weight_UD.dtype}; both must be the same one of bfloat16, float32 "
            "or float64 (float16 cannot hold per-token gradients): cast one of them"
        )
    if hidden_ND.device != weight_UD.device:
        raise ValueError(f"hidden is on {hidden_ND.device} and weight on {weight_UD.device}; move them to one device")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")


def check_target(target_N: Tensor, hidden_ND: Tensor) -> None:
    if target_N.shape != hidden_ND.shape[:1] or target_N.dtype.is_floating_point or target_N.dtype == torch.bool:
        raise ValueError(f"target is {target_N.dtype} {tuple(target_N.shape)}; it must be integer [{len(hidden_ND)}]")
    if target_N.device != hidden_ND.device:
        raise ValueError(f"target is on {target_N.device} and hidden on {hidden_ND.device}; move them to one device")


def check_vocab_size(weight_UD: Tensor, vocab_size: int | None, *, sharded: bool) -> None:
    if vocab_size is None:
        return
    if vocab_size < 1 or (not sharded and vocab_size > len(weight_UD)):
        raise ValueError(f"vocab_size is {vocab_size}; the weight has {len(weight_UD)} rows, so pass 1 to that many")


def check_main_grad(main_grad_UD: Tensor | None, weight_UD: Tensor) -> None:
    if main_grad_UD is None:
        return
    dtype = accumulator_dtype(weight_UD.dtype)
    if main_grad_UD.shape != weight_UD.shape or main_grad_UD.dtype != dtype or main_grad_UD.device != weight_UD.device:
        raise ValueError(
            f"weight_main_grad is {main_grad_UD.dtype} {tuple(main_grad_UD.shape)} on {main_grad_UD.device}; it must "
            f"be {dtype} {tuple(weight_UD.shape)} on {weight_UD.device}"
        )
    if torch.compiler.is_compiling():
        raise ValueError("weight_main_grad cannot be written inside torch.compile: leave this call out of the graph")
    if main_grad_UD.requires_grad:
        raise ValueError("weight_main_grad requires grad; it is a buffer that is written in place: detach it")


def check_filter(filter_eps: float) -> None:
    if not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps is {filter_eps}; it must lie in [0, 1), and 0 is exact")


def check_budget(budget: ChunkBudget, hidden_ND: Tensor) -> None:
    if budget.bf16_logits and hidden_ND.dtype != torch.bfloat16:
        raise ValueError(f"budget.bf16_logits is True and hidden is {hidden_ND.dtype}; it is for bfloat16 inputs only")


def check_policy_terms(terms: PolicyTerms, numbers: LossNumbers, tokens: int) -> None:
    """Raises ValueError unless every field of `terms` is [tokens] and the numbers of the loss are in range."""
    for name, value in vars(terms).items():
        if value is not None and value.shape != (tokens,):
            raise ValueError(
                f"terms.{name} is {tuple(value.shape)}; hidden has {tokens} rows, so it must be [{tokens}]"
            )
    if not 0 <= numbers.clip_eps_low <= 1 or not numbers.clip_eps_high >= 0:
        raise ValueError(
            f"clip_eps_low is {numbers.clip_eps_low} and clip_eps_high {numbers.clip_eps_high}; the clip range "
            "[1 − clip_eps_low, 1 + clip_eps_high] must hold 1 and nothing negative"
        )
    if not numbers.importance_cap > 0:
        raise ValueError(f"importance_cap is {numbers.importance_cap}; it must be positive")
    if not numbers.kl_clamp > 0:
        raise ValueError(f"kl_clamp is {numbers.kl_clamp}; it must be positive, and inf clamps nothing")
    if numbers.surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {numbers.surrogate!r}; it must be one of {', '.join(SURROGATES)}")
    temperatures = (numbers.gate_temperature_low, numbers.gate_temperature_high)
    if not min(temperatures) > 0:
        raise ValueError(f"gate_temperatures is {temperatures}; both must be positive")
    if numbers.surrogate == "constant-ratio" and terms.sequence_N is not None:
        raise ValueError("surrogate='constant-ratio' weighs tokens one by one; leave out terms.sequence_N")
    if (terms.ratio_low_N is None) != (terms.ratio_high_N is None):
        raise ValueError("terms has one of ratio_low_N and ratio_high_N; give both or neither")
    if (terms.logp_reference_N is None) != (terms.reference_weight_N is None):
        raise ValueError("terms has one of logp_reference_N and reference_weight_N; give both or neither")
    if terms.sequence_N is not None and terms.sequence_N.dtype.is_floating_point:
        raise ValueError(f"terms.sequence_N is {terms.sequence_N.dtype}; it must be integer")


def check_pair(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], vocab_size: int | None, *, sharded: bool
) -> None:
    """Raises ValueError unless two heads, (hidden, weight) each, that passed `check_head` can be compared."""
    for student_tensor, teacher_tensor in zip(student, teacher, strict=True):
        if student_tensor.dtype != teacher_tensor.dtype or student_tensor.device != teacher_tensor.device:
            raise ValueError(
                f"the student's head is {student_tensor.dtype} on {student_tensor.device} and the "
                f"teacher's {teacher_tensor.dtype} on {teacher_tensor.device}; cast or move one of them"
            )
    if len(student[0]) != len(teacher[0]):
        raise ValueError(
            f"student_hidden has {len(student[0])} rows and teacher_hidden {len(teacher[0])}: one per token"
        )
    rows, teacher_rows = len(student[1]), len(teacher[1])
    if rows == teacher_rows:
        check_vocab_size(student[1], vocab_size, sharded=sharded)
    elif sharded:
        raise ValueError(
            f"this rank holds {rows} rows of the student's weight and {teacher_rows} of the teacher's; shard both alike"
        )
    elif vocab_size is None or not 1 <= vocab_size <= min(rows, teacher_rows):
        raise ValueError(
            f"student_weight has {rows} rows and teacher_weight {teacher_rows}, vocab_size is {vocab_size}; pass the "
            f"number of ids that mean the same token in both, at most {min(rows, teacher_rows)}"
        )


def check_divergence(divergence: Divergence, top_k: int | None, weight_N: Tensor, tokens: int) -> None:
    if divergence.kind not in KINDS:
        raise ValueError(f"divergence is {divergence.kind!r}; it must be one of {', '.join(KINDS)}")
    if not 0 < divergence.alpha < 1:
        raise ValueError(
            f"alpha is {divergence.alpha}; it must lie inside (0, 1): at the ends jsd is 0 everywhere, take "
            "divergence='forward_kl' for alpha → 0 and 'reverse_kl' for alpha → 1"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for the full vocabulary")
    if weight_N.shape != (tokens,):
        raise ValueError(f"weight_N is {tuple(weight_N.shape)}; hidden has {tokens} rows, so it must be [{tokens}]")
