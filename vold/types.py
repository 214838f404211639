"""The records of one step: Prompt -> Rollout -> Group -> Sample -> Batch -> StepReport.

Every record is frozen; each stage returns new ones. Shape letters, here and wherever these records are read:
P prompts, G responses per prompt, B sequences in a micro-batch, T packed tokens of a micro-batch, N of them that
predict a response token, K keys and values that attention reads, S segments, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RecordT = TypeVar("RecordT", bound="PackedTokens | MicroBatch | DistributionTerm")

TokenIds = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
"""Natural logarithms of probabilities."""

Experts = npt.NDArray[np.int16]
"""Numbers of a mixture's experts, from 0."""

_ARRAY_FIELDS = {
    "token_ids": np.int32,
    "response_ids": np.int32,
    "versions": np.int32,
    "logp_rollout": np.float32,
    "logp_teacher": np.float32,
    "experts": np.int16,
}


def read_only(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`values` as an array that cannot be written to; a copy, unless it is such an array already."""
    if isinstance(values, np.ndarray) and values.dtype == dtype and not values.flags.writeable:
        return values
    array = np.array(values, dtype)
    array.setflags(write=False)
    return array


class _ArrayRecord:
    """A frozen dataclass (declared with eq=False) whose token ids and log-probabilities are read-only arrays.

    The constructor takes them as any sequence of numbers. Records are compared and hashed by the values of all fields.
    """

    def __post_init__(self) -> None:
        for name, dtype in _ARRAY_FIELDS.items():
            if (values := vars(self).get(name)) is not None:
                object.__setattr__(self, name, read_only(values, dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _ArrayRecord.__post_init__(self)  # arrays arrive writable from another process

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[object, ...]:
        values = (value for name, value in vars(self).items() if name != "metadata")
        return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


class _ScoredByTeacher:
    """Names the three states of `logp_teacher`: None, empty, and one number per response token."""

    logp_teacher: Logprobs | None

    @property
    def teacher_failed(self) -> bool:
        """The teacher's log-probabilities were requested and did not come: `logp_teacher` is empty, not None."""
        return self.logp_teacher is not None and not len(self.logp_teacher)


@dataclass(frozen=True, eq=False)
class Prompt(_ArrayRecord):
    """A problem, rendered once. `token_ids` holds *one* image-pad id per image, expanded where a model reads it. The
    other fields are the problem's (see Problem); `metadata` takes no part in comparisons."""

    id: str
    token_ids: TokenIds
    text: str
    gold: str = ""
    images: tuple[Path, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""
    history: tuple[tuple[str, str], ...] = ()
    other_golds: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rollout(_ArrayRecord, _ScoredByTeacher):
    """One sampled response: ids as sampled (never re-tokenised), each with the sampler's log-probability (nats).

    version: the number of weight syncs before it was sampled, of its oldest token; versions: of each token, where the
    weights changed on the way; None: `version` for all.
    logp_teacher: the teacher's, requested while other prompts were still being answered; None: not requested; empty:
    the request failed (`teacher_failed`).
    experts: of a mixture, [tokens, layers, k]: those that the sampler chose in each layer for each token of the prompt,
    as the model reads it, and of the response, the last one left out; None: it does not say.
    """

    prompt: Prompt
    response_ids: TokenIds
    logp_rollout: Logprobs
    finish_reason: Literal["stop", "length"]
    text: str
    version: int = 0
    logp_teacher: Logprobs | None = None
    experts: Experts | None = None
    versions: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Verdict:
    """The grader's result and the rule that decided it. broken: the grader failed, not the answer; such a response is
    masked out and counted. gold: the normalised gold answer."""

    outcome: Literal["correct", "wrong", "broken"]
    extracted: str | None
    rule: str
    seconds: float = 0.0
    gold: str = ""


@dataclass(frozen=True)
class Group:
    """All G responses of one prompt with their verdicts and rewards; `None` reward = grader or reward function broke.
    earlier: the rewards of each earlier step that sampled responses to the same prompt. values: of each response, the
    reward's terms by name, before their weights (None: it failed); empty where the rewards are made otherwise.
    feedback: what reward functions say of each response, in words; empty where there are none."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]
    rewards: tuple[float | None, ...]
    earlier: tuple[tuple[float, ...], ...] = ()
    values: tuple[Mapping[str, float | None], ...] = ()
    feedback: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Hint:
    """Text that a self-teacher reads beside the problem: a correct sibling's answer, what is wrong, or
    both."""

    demonstration: str | None = None
    feedback: str | None = None


@dataclass(frozen=True, eq=False)
class Sample(_ArrayRecord, _ScoredByTeacher):
    """One sequence to learn from. Both weights apply to each of its response tokens and already contain the
    normaliser, beta and every mask: loss = sum over tokens of pg_weight * L_pg + kl_weight * L_kl, and where there is a
    frozen reference + reference_weight * L_ref."""

    prompt: Prompt
    response_ids: TokenIds
    advantage: float
    pg_weight: float
    kl_weight: float
    logp_rollout: Logprobs | None = None
    logp_teacher: Logprobs | None = None  # see Rollout
    minibatch: int = 0  # which update of the step learns from it
    hint: Hint | None = None
    reference_weight: float = 0.0
    success: float = 0.0  # what routing reads: 1 for a right response
    experts: Experts | None = None  # see Rollout

    def without_kl(self) -> Sample:
        """The same sample with no KL term to a teacher."""
        return replace(self, kl_weight=0.0)

    def without_weights(self) -> Sample:
        """The same sample with no term in the loss. It keeps its position among the step's samples."""
        return replace(self, pg_weight=0.0, kl_weight=0.0, reference_weight=0.0)


@dataclass(frozen=True)
class Picture:
    """An image as a model's processor prepared it. Pictures of one key are the same: its features are computed once.

    pixel_values  float32 [patches, channels * frames * patch * patch], on the CPU until the vision tower runs
    grid_thw      patches along (time, height, width), before merging
    """

    key: str
    pixel_values: Tensor
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class PackedTokens:
    """Sequences laid end to end, as both models read them. A prompt is packed once for the responses that share it.

    A segment is a run of queries that read keys together, causally: its last query reads all its keys, the one before
    it all but the last. One holds a prompt and a response; each further response to the prompt is a segment of its
    own, whose keys are the prompt's and its own. What precedes a response's last token is all there is of it: that
    token predicts nothing.

    input_ids_T      int64; image-pad ids expanded to one per merged image patch
    position_ids_3T  int64 (temporal, height, width); the three rows are equal where there is no image
    cu_seqlens       int32 [S + 1], cumulative numbers of queries, starting at 0; no segment is empty
    cu_seqlens_k     int32 [S + 1], cumulative numbers of keys
    kv_index_K       int64, index into T of each key, ascending in a segment; None: every key is its own query's
    pictures         in the order of their tokens in T
    segments         (queries, keys) of each segment, on the host: nobody waits for the device to read the boundaries
    experts_TLk      int16, the experts that the sampler chose in each layer, -1 where it does not say; None: nowhere
    first_keys       index into T of each segment's first key, on the host
    """

    input_ids_T: Tensor
    position_ids_3T: Tensor
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    kv_index_K: Tensor | None = None
    pictures: tuple[Picture, ...] = ()
    segments: tuple[tuple[int, int], ...] = ()
    experts_TLk: Tensor | None = None
    first_keys: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.segments:
            bounds = torch.stack([self.cu_seqlens, self.cu_seqlens_k])
            object.__setattr__(self, "segments", tuple(map(tuple, bounds.diff().T.tolist())))
        if not self.first_keys:
            first = self.cu_seqlens if self.kv_index_K is None else self.kv_index_K[self.cu_seqlens_k[:-1].long()]
            object.__setattr__(self, "first_keys", tuple(first.tolist()[: len(self.segments)]))

    def to(self, device: torch.device) -> PackedTokens:
        """The same record with its tensors on `device`; pictures stay on the CPU."""
        return _to_device(self, device)


@dataclass(frozen=True)
class DistributionTerm:
    """A KL term of a micro-batch that compares whole distributions with a further model, beside the objective's own.

    name        of the model; its metrics begin with it
    weight_N    float32, the weight of the term at each token
    rows        of the n tokens whose weight is not 0 (under context parallelism of this rank's): the model's hidden
                states [n, E] that predict them and this rank's rows of its head [U, E]; or, with `is_top`, its most
                probable ids [n, k] and their log-probs [n, k]
    options     keywords of `linear_kl` (`linear_topk_kl`) that say which divergence it is
    ratio_cap   see VocabularyDivergence
    """

    name: str
    weight_N: Tensor
    rows: tuple[Tensor, Tensor]
    options: Mapping[str, Any]
    ratio_cap: float
    is_top: bool = False

    def without(self, lost_N: Tensor, own_N: Tensor) -> DistributionTerm:
        """The term without weight at these tokens. own_N: the tokens that may have a row in `rows`."""
        kept_n = ~lost_N[(self.weight_N != 0) & own_N]
        first, second = self.rows
        rows = (first[kept_n], second[kept_n] if self.is_top else second)
        return replace(self, weight_N=self.weight_N.masked_fill(lost_N, 0.0), rows=rows)

    def to(self, device: torch.device) -> DistributionTerm:
        """The same record with its tensors on `device`."""
        return _to_device(self, device)


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens and, for the N positions that predict a response token, the inputs of the loss.

    source_N    int64, index into T of the position whose hidden state predicts the token
    target_N    int64, the token id
    sequence_N  int64, which of the B sequences the token belongs to
    sample_B    for each sequence, its index in the list of samples that was packed
    samples_B   the samples themselves, for a teacher with its own prompt encoder
    advantage_N, pg_weight_N, kl_weight_N   float32, see Sample
    logp_rollout_N   float32 or None (traces were not sampled by the student)
    logp_teacher_N   float32 or None until the teacher has scored; 0 where kl_weight_N is 0
    hidden_teacher_nE, head_teacher_UE   the teacher's hidden states that predict the n tokens whose kl_weight_N is not
                0 (under context parallelism this rank's of them), and this rank's rows of its head, where the objective
                compares whole distributions; else None
    top_teacher      int64 ids [n, k] and float32 log-probs [n, k] of the teacher's most probable ids in the place of
                     the n tokens (under context parallelism this rank's), where the objective compares those
    logp_old_N       float32, log-prob before the step's first update, or None: its only update, the ratio is 1
    reference_weight_N   float32, see Sample; None: no token has a weight
    logp_reference_N     float32, log-probs of a frozen reference, where its term is k3
    further_terms        KL terms to further models
    """

    tokens: PackedTokens
    source_N: Tensor
    target_N: Tensor
    sequence_N: Tensor
    sample_B: tuple[int, ...]
    samples_B: tuple[Sample, ...]
    advantage_N: Tensor
    pg_weight_N: Tensor
    kl_weight_N: Tensor
    logp_rollout_N: Tensor | None = None
    logp_teacher_N: Tensor | None = None
    logp_old_N: Tensor | None = None
    hidden_teacher_nE: Tensor | None = None
    head_teacher_UE: Tensor | None = None
    reference_weight_N: Tensor | None = None
    logp_reference_N: Tensor | None = None
    further_terms: tuple[DistributionTerm, ...] = ()
    top_teacher: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same record with its tensors, and those of its tokens, on `device`."""
        return _to_device(self, device)


_TUPLES = ("further_terms", "rows", "top_teacher")  # of what moves too


def _to_device(record: RecordT, device: torch.device) -> RecordT:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    moved |= {name: value.to(device) for name, value in values.items() if isinstance(value, PackedTokens)}
    moved |= {
        name: tuple(item.to(device) for item in value)
        for name, value in values.items()
        if name in _TUPLES and value is not None
    }
    return replace(record, **moved)


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimisation step; every rank holds the same number of micro-batches."""

    micro_batches: tuple[MicroBatch, ...]

    def to(self, device: torch.device) -> Batch:
        """The same record with every micro-batch on `device`."""
        return Batch(tuple(micro_batch.to(device) for micro_batch in self.micro_batches))


@dataclass(frozen=True)
class StepReport:
    """metrics: numbers of one step, reduced over all ranks, as they go to metrics.jsonl. mean_kl: for the samples of
    all ranks (by index) that had a KL term, the mean of 1/2 (logp - logp_teacher)^2 over their tokens, nats^2.
    tokens: for the samples that were requested and trained on, `logp` and, where the teacher scored them,
    `logp_teacher` of each response token, nats."""

    metrics: dict[str, float]
    mean_kl: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, dict[str, list[float]]] = field(default_factory=dict)


class Diverged(ValueError):
    """Training that cannot go on with its weights: optimizer.max_bad_steps steps in a row changed none, or they are no
    longer finite."""
