"""Samples -> Batch: sequences laid end to end in micro-batches of bounded length, a prompt once for the responses that
share it, divided among the data-parallel replicas so that all have equally much work. B sequences, T tokens, N targets,
P prompt tokens, L tokens of one sequence, K keys: see PackedTokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vold.types import Batch, MicroBatch, PackedTokens, Picture, Prompt, Sample, TokenIds


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as a model reads it: P image-pad ids expanded, positions [3, P]. A response's positions count on from
    the largest."""

    prompt_ids: TokenIds
    position_ids_3P: Tensor
    pictures: tuple[Picture, ...] = ()


class PromptEncoder(Protocol):
    """Turns a prompt into a model's input: token ids, position ids and pictures."""

    def __call__(self, prompt: Prompt) -> EncodedPrompt: ...

    def length(self, prompt: Prompt) -> int:
        """Its P, without reading a pixel. Raises ValueError for a prompt that the model cannot read."""
        ...


def _queries(queries: int, keys: int) -> float:
    return queries


@dataclass(frozen=True)
class Replicas:
    """The data-parallel copies of the model, `count` of them, of which this is number `rank`. cost: (queries, keys) of
    a segment -> its work, in any unit."""

    count: int = 1
    rank: int = 0
    cost: Callable[[int, int], float] = _queries


class TextPromptEncoder:
    """Text only: positions count up, the same in all three planes."""

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(prompt.token_ids, torch.arange(self.length(prompt)).expand(3, -1))

    def length(self, prompt: Prompt) -> int:
        if prompt.images:
            raise ValueError(f"{prompt.id} has images and the model reads text only: use one with a vision tower")
        return len(prompt.token_ids)


encode_text = TextPromptEncoder()


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    replicas: Replicas = Replicas(),
    encode: PromptEncoder = encode_text,
) -> Batch:
    """This replica's share of a step's samples in micro-batches of at most `max_tokens`, equally many on every replica.

    Every replica passes the same samples and plans the whole division, so that none has to ask another. A sample whose
    weights are all zero has no gradient: it is left out, exactly (its tokens are in the normaliser already). A replica
    with too few sequences gets micro-batches of one token and no target.
    """
    groups = _siblings(samples, encode)
    largest = max(map(len, groups), default=1) if replicas.count > 1 else 1
    pieces = sorted({min(1 << power, largest) for power in range(largest.bit_length() + 1)})
    plans = [_divide(_units(groups, max_tokens, count), max_tokens, replicas) for count in pieces]
    shares, _ = min(plans, key=itemgetter(1))  # a prompt is read again where that evens out the replicas' work
    encode = cache(encode)  # pieces of a group share their prompt's pictures
    return Batch(tuple(_micro_batch(units, encode) for units in shares[replicas.rank]))


def repack_for_teacher(micro: MicroBatch, rows_n: Tensor, encode: Callable[[Prompt], EncodedPrompt]) -> MicroBatch:
    """The input with which another model predicts `rows_n` (ascending) of a micro-batch's targets: the same responses
    behind prompts as `encode` gives them. Tokens, source_N and target_N are new, on the CPU; targets keep order."""
    sequence_N, rows_n = micro.sequence_N.cpu(), rows_n.cpu()
    read_sequences = sequence_N[rows_n].unique()
    units: dict[Prompt, _Unit] = {}
    for sequence in read_sequences.tolist():
        sample = replace(micro.samples_B[sequence], experts=None)  # of the student
        units.setdefault(sample.prompt, []).append(_Member(sequence, sample, 0))
    repacked = _micro_batch(list(units.values()), encode)
    # Its sequences are in another order; a stable sort by sequence restores that of `micro`.
    repacked_rows = torch.tensor(repacked.sample_B)[repacked.sequence_N].argsort(stable=True)
    rows = torch.isin(sequence_N, read_sequences).nonzero()[:, 0]
    order_n = repacked_rows[torch.searchsorted(rows, rows_n)]
    return replace(
        micro, tokens=repacked.tokens, source_N=repacked.source_N[order_n], target_N=repacked.target_N[order_n]
    )


def filler() -> MicroBatch:
    """A micro-batch of one token and no target: the smallest forward pass, without loss or gradient."""
    return _micro_batch([], encode_text)


class _Member(NamedTuple):
    """A sample, its index in the list of samples, and the number of its prompt's tokens, those of images included."""

    index: int
    sample: Sample
    prompt_tokens: int


_Unit = list[_Member]
"""Siblings of one micro-batch, whose prompt is packed once."""


def _siblings(samples: Sequence[Sample], encode: PromptEncoder) -> list[_Unit]:
    """The samples that have a gradient, by prompt."""
    units: dict[Prompt, _Unit] = {}
    for index, sample in enumerate(samples):
        if sample.pg_weight or sample.kl_weight or sample.reference_weight:
            unit = units.setdefault(sample.prompt, [])
            tokens = unit[0].prompt_tokens if unit else encode.length(sample.prompt)
            unit.append(_Member(index, sample, tokens))
    return list(units.values())


def _units(groups: Sequence[_Unit], max_tokens: int, pieces: int) -> list[_Unit]:
    """Each group in `pieces` units, or more where one would exceed max_tokens."""
    units: list[_Unit] = []
    for group in groups:
        unit: _Unit = []
        for member in group:
            if len(unit) * pieces >= len(group) or (unit and _size([*unit, member]) > max_tokens):
                units.append(unit)
                unit = []
            unit.append(member)
        units.append(unit)
    return units


def _size(unit: _Unit) -> int:
    return sum(queries for queries, _ in _segments(unit))


def _work(unit: _Unit, cost: Callable[[int, int], float]) -> float:
    return sum(cost(*segment) for segment in _segments(unit))


def _segments(unit: _Unit) -> list[tuple[int, int]]:
    """(queries, keys) of the prompt with the first response, and of each further one."""
    prompt = unit[0].prompt_tokens
    first, *others = (len(member.sample.response_ids[:-1]) for member in unit)
    return [(prompt + first, prompt + first), *((queries, prompt + queries) for queries in others)]


def _divide(units: Sequence[_Unit], max_tokens: int, replicas: Replicas) -> tuple[list[list[list[_Unit]]], float]:
    """Units by replica and micro-batch, and the work of the busiest replica.

    The longest unit goes first, into the micro-batch with the least work that can hold it; micro-batches are added, one
    per replica, until everything fits. Then the costliest micro-batches are dealt to the replicas in alternating order,
    which evens their sums.
    """
    sized = sorted(((_size(unit), _work(unit, replicas.cost), unit) for unit in units), key=lambda row: -row[0])
    each = max(1, -(-sum(size for size, _, _ in sized) // (max_tokens * replicas.count)))
    while (bins := _fill(sized, max_tokens, each * replicas.count)) is None:
        each += 1
    bins.sort(key=lambda work_and_units: -work_and_units[0])
    order = [*range(replicas.count), *reversed(range(replicas.count))]
    shares: list[list[list[_Unit]]] = [[] for _ in range(replicas.count)]
    works = [0.0] * replicas.count
    for number, (work, units_of_bin) in enumerate(bins):
        replica = order[number % len(order)]
        shares[replica].append(units_of_bin)
        works[replica] += work
    return shares, max(works)


def _fill(sized: list[tuple[int, float, _Unit]], max_tokens: int, count: int) -> list[tuple[float, list[_Unit]]] | None:
    """`count` bins of at most `max_tokens` (a longer unit is alone in one) with their work; None if they do not fit."""
    bins, fill, works = [[] for _ in range(count)], [0] * count, [0.0] * count
    for size, work, unit in sized:
        open_bins = [b for b in range(count) if not bins[b] or fill[b] + size <= max_tokens]
        if not open_bins:
            return None
        emptiest = min(open_bins, key=works.__getitem__)
        bins[emptiest].append(unit)
        fill[emptiest] += size
        works[emptiest] += work
    return list(zip(works, bins, strict=True))


@dataclass(frozen=True)
class _Sequence:
    """A sample and its prompt, whose tokens are packed with the first sample of the unit."""

    unit: int
    first: bool
    index: int
    sample: Sample
    prompt: EncodedPrompt

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)"""
        prompt, response = len(self.prompt.prompt_ids), len(self.sample.response_ids[:-1])
        return (prompt if self.first else 0) + response, prompt + response

    @property
    def ids(self) -> TokenIds:
        response_ids = self.sample.response_ids[:-1]
        return np.concatenate([self.prompt.prompt_ids, response_ids]) if self.first else response_ids

    @property
    def position_ids_3L(self) -> Tensor:
        prompt_3P = self.prompt.position_ids_3P
        response_3L = (prompt_3P.max() + 1 + torch.arange(len(self.sample.response_ids[:-1]))).expand(3, -1)
        return torch.cat([prompt_3P, response_3L], dim=1) if self.first else response_3L

    def experts_LLk(self, shape: tuple[int, int]) -> npt.NDArray:
        """Of the tokens in `ids`; -1 where the sampler did not say. shape: layers, experts of a token. Raises
        ValueError where the sampler read another number of tokens."""
        queries, keys = self.shape
        experts = self.sample.experts
        if experts is None:
            return np.full((queries, *shape), -1, np.int16)
        if experts.shape != (keys, *shape):
            raise ValueError(
                f"{self.sample.prompt.id}: the sampler chose experts {experts.shape} (tokens, layers, of a token) and "
                f"the trainer reads {(keys, *shape)}: they do not read the same prompt, or not with the same model"
            )
        return experts[keys - queries :]


def _micro_batch(units: Sequence[_Unit], encode: Callable[[Prompt], EncodedPrompt]) -> MicroBatch:
    sequences = [
        _Sequence(number, member is unit[0], member.index, member.sample, prompt)
        for number, (unit, prompt) in enumerate((unit, encode(unit[0].sample.prompt)) for unit in units)
        for member in unit
    ]
    # A prompt lies before those that read it; segments of one shape side by side: sdpa_attention runs them together.
    sequences.sort(key=lambda sequence: (not sequence.first, sequence.shape))
    samples = [sequence.sample for sequence in sequences]
    keys = _keys(sequences)
    counts = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.int64)
    sources = [  # the hidden state one position earlier predicts a token: of the first one, the prompt's last
        key_L[len(s.prompt.prompt_ids) - 1 :][: len(s.sample.response_ids)]
        for key_L, s in zip(keys, sequences, strict=True)
    ]
    rollout_logps = [s.logp_rollout for s in samples if s.logp_rollout is not None]
    references = [s.reference_weight for s in samples]
    teacher_logps = [s.logp_teacher if _is_scored(s) else np.zeros(len(s.response_ids)) for s in samples]
    return MicroBatch(
        tokens=_tokens(sequences, keys),
        source_N=torch.cat(sources) if sources else torch.zeros(0, dtype=torch.int64),
        target_N=_flat([s.response_ids for s in samples], torch.int64),
        sequence_N=torch.arange(len(samples)).repeat_interleave(counts),
        sample_B=tuple(sequence.index for sequence in sequences),
        samples_B=tuple(samples),
        advantage_N=_per_token([s.advantage for s in samples], counts),
        pg_weight_N=_per_token([s.pg_weight for s in samples], counts),
        kl_weight_N=_per_token([s.kl_weight for s in samples], counts),
        logp_rollout_N=_flat(rollout_logps, torch.float32) if samples and len(rollout_logps) == len(samples) else None,
        logp_teacher_N=_flat(teacher_logps, torch.float32) if any(map(_is_scored, samples)) else None,
        reference_weight_N=_per_token(references, counts) if any(references) else None,
    )


def _keys(sequences: Sequence[_Sequence]) -> list[Tensor]:
    """For each sequence, the indices into T of its prompt and response tokens."""
    start, keys, prompt_of_unit = 0, [], {}
    for sequence in sequences:
        queries, _ = sequence.shape
        query_L = torch.arange(start, start + queries)
        if sequence.first:
            prompt_of_unit[sequence.unit] = query_L[: len(sequence.prompt.prompt_ids)]
            keys.append(query_L)
        else:
            keys.append(torch.cat([prompt_of_unit[sequence.unit], query_L]))
        start += queries
    return keys


def _tokens(sequences: Sequence[_Sequence], keys: Sequence[Tensor]) -> PackedTokens:
    if not sequences:  # no sequence: the shortest input that a model accepts
        token_1, cu_seqlens = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
        return PackedTokens(token_1, token_1.expand(3, 1), cu_seqlens, cu_seqlens)
    segments = [(s.shape, key_L) for s, key_L in zip(sequences, keys, strict=True) if s.shape[0]]
    cu_seqlens, cu_seqlens_k = torch.tensor([(0, 0), *(shape for shape, _ in segments)]).cumsum(0).to(torch.int32).T
    prompts = [s.prompt for s in sequences if s.first]
    return PackedTokens(
        input_ids_T=_flat([s.ids for s in sequences], torch.int64),
        position_ids_3T=torch.cat([s.position_ids_3L for s in sequences], dim=1),
        cu_seqlens=cu_seqlens.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        kv_index_K=None if len(prompts) == len(segments) else torch.cat([key_L for _, key_L in segments]),
        pictures=tuple(picture for prompt in prompts for picture in prompt.pictures),
        experts_TLk=_experts(sequences),
    )


def _experts(sequences: Sequence[_Sequence]) -> Tensor | None:
    shape = next((s.sample.experts.shape[1:] for s in sequences if s.sample.experts is not None), None)
    return None if shape is None else torch.from_numpy(np.concatenate([s.experts_LLk(shape) for s in sequences]))


def _per_token(values: list[float], counts: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)


def _is_scored(sample: Sample) -> bool:
    return sample.logp_teacher is not None and not sample.teacher_failed


def _flat(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.concatenate(rows) if rows else (), dtype=dtype)
