"""Samples -> Batch: sequences laid end to end in micro-batches of bounded length, a prompt once for the responses that
share it, divided among the data-parallel replicas so that all have equally much work. B sequences, T tokens, N targets,
P prompt tokens, L tokens of one sequence, K keys: see PackedTokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vold.records import Batch, MicroBatch, PackedTokens, Prompt, Sample


@dataclass(frozen=True)
class Encoded:
    """A prompt as a model reads it: P image-pad ids expanded, positions [3, P]. A response's positions count on from
    the largest."""

    prompt_ids: Sequence[int]
    position_ids_3P: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


Encoder = Callable[[Prompt], Encoded]


def _queries(queries: int, keys: int) -> float:
    return queries


@dataclass(frozen=True)
class Replicas:
    """`count` data-parallel copies of the model share a step; this is number `rank`. `cost`: work that a segment of so
    many queries and keys is, in any unit."""

    count: int = 1
    rank: int = 0
    cost: Callable[[int, int], float] = _queries


def encode_text(prompt: Prompt) -> Encoded:
    """Text only: positions count up, the same in all three planes."""
    if prompt.images:
        raise ValueError(f"{prompt.id} has images; this stage reads text only")
    return Encoded(prompt.token_ids, torch.arange(len(prompt.token_ids)).expand(3, -1))


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    replicas: Replicas = Replicas(),
    encode: Encoder = encode_text,
) -> Batch:
    """This replica's share of a step's samples in micro-batches of at most `max_tokens`, equally many on every replica.

    Every replica passes the same samples and plans the whole division, so that none has to ask another. A sample whose
    two weights are zero has no gradient: it is left out, exactly (its tokens are in the normaliser already). A replica
    with too few sequences gets micro-batches of one token and no target.
    """
    placed = [[(place, samples[place]) for place in unit] for unit in _units(samples, max_tokens, replicas.count)]
    segments = [_segments([sample for _, sample in unit]) for unit in placed]
    sizes = [sum(queries for queries, _ in unit) for unit in segments]
    works = [sum(replicas.cost(*segment) for segment in unit) for unit in segments]
    mine = _divide(sizes, works, max_tokens, replicas.count)[replicas.rank]
    return Batch(tuple(_micro_batch([placed[unit] for unit in micro], encode) for micro in mine))


def filler() -> MicroBatch:
    """A micro-batch of one token and no target: the least a model runs, without loss or gradient."""
    return _micro_batch([], encode_text)


UNITS_PER_REPLICA = 4  # at least, where there are several: whole groups may be too few to give all equal work


def _units(samples: Sequence[Sample], max_tokens: int, replicas: int) -> list[list[int]]:
    """Places of samples with a gradient that lie together and read their prompt once: all of a prompt's, or where
    that is too long as many as fit."""
    siblings: dict[Prompt, list[int]] = {}
    for place, sample in enumerate(samples):
        if sample.pg_weight or sample.kl_weight:
            siblings.setdefault(sample.prompt, []).append(place)
    if replicas > 1:
        total = sum(q for places in siblings.values() for q, _ in _segments([samples[place] for place in places]))
        max_tokens = min(max_tokens, total // (UNITS_PER_REPLICA * replicas))
    units: list[list[int]] = []
    for prompt, places in siblings.items():
        fill = max_tokens
        for place in places:
            queries = len(samples[place].response_ids[:-1])
            if place == places[0] or fill + queries > max_tokens:
                units.append([])
                fill = len(prompt.token_ids)
            units[-1].append(place)
            fill += queries
    return units


def _segments(siblings: Sequence[Sample]) -> list[tuple[int, int]]:
    """(queries, keys) of the prompt with the first response, and of each further one."""
    prompt = len(siblings[0].prompt.token_ids)
    first, *others = (len(sample.response_ids[:-1]) for sample in siblings)
    return [(prompt + first, prompt + first), *((queries, prompt + queries) for queries in others)]


def _divide(sizes: list[int], works: list[float], max_tokens: int, replicas: int) -> list[list[list[int]]]:
    """Numbers of units by replica and micro-batch. Longest unit first into the micro-batch with the least work that has
    room; micro-batches are added, one a replica, until everything fits. Then the costliest are dealt out to the
    replicas to and fro, which evens their sums."""
    each = max(1, -(-sum(sizes) // (max_tokens * replicas)))
    while (bins := _fill(sizes, works, max_tokens, each * replicas)) is None:
        each += 1
    bins.sort(key=lambda units: -sum(works[unit] for unit in units))
    order = [*range(replicas), *reversed(range(replicas))]
    shares: list[list[list[int]]] = [[] for _ in range(replicas)]
    for number, units in enumerate(bins):
        shares[order[number % len(order)]].append(units)
    return shares


def _fill(sizes: list[int], works: list[float], max_tokens: int, count: int) -> list[list[int]] | None:
    """The units in `count` bins of at most `max_tokens` (a longer one lies alone), or None: they do not fit."""
    bins, fill, work = [[] for _ in range(count)], [0] * count, [0.0] * count
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        room = [b for b in range(count) if not bins[b] or fill[b] + sizes[unit] <= max_tokens]
        if not room:
            return None
        emptiest = min(room, key=work.__getitem__)
        bins[emptiest].append(unit)
        fill[emptiest] += sizes[unit]
        work[emptiest] += works[unit]
    return bins


@dataclass(frozen=True)
class _Sequence:
    """A sample at its place, behind a prompt that the first of its unit brings along."""

    unit: int
    first: bool
    place: int
    sample: Sample
    prompt: Encoded

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)"""
        prompt, own = len(self.prompt.prompt_ids), len(self.sample.response_ids[:-1])
        return (prompt if self.first else 0) + own, prompt + own

    @property
    def ids(self) -> list[int]:
        return [*(self.prompt.prompt_ids if self.first else ()), *self.sample.response_ids[:-1]]

    @property
    def position_ids_3L(self) -> Tensor:
        prompt_3P = self.prompt.position_ids_3P
        own_3L = (prompt_3P.max() + 1 + torch.arange(len(self.sample.response_ids[:-1]))).expand(3, -1)
        return torch.cat([prompt_3P, own_3L], dim=1) if self.first else own_3L


def _micro_batch(units: Sequence[Sequence[tuple[int, Sample]]], encode: Encoder) -> MicroBatch:
    """`units`: siblings with their places."""
    prompts = [encode(siblings[0][1].prompt) for siblings in units]
    sequences = [
        _Sequence(unit, number == 0, place, sample, prompts[unit])
        for unit, siblings in enumerate(units)
        for number, (place, sample) in enumerate(siblings)
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
    return MicroBatch(
        tokens=_tokens(sequences, keys),
        source_N=torch.cat(sources) if sources else torch.zeros(0, dtype=torch.int64),
        target_N=torch.tensor([token for s in samples for token in s.response_ids], dtype=torch.int64),
        sequence_N=torch.arange(len(samples)).repeat_interleave(counts),
        sample_B=tuple(sequence.place for sequence in sequences),
        advantage_N=_per_token([s.advantage for s in samples], counts),
        pg_weight_N=_per_token([s.pg_weight for s in samples], counts),
        kl_weight_N=_per_token([s.kl_weight for s in samples], counts),
        logp_rollout_N=_flat(rollout_logps) if samples and len(rollout_logps) == len(samples) else None,
    )


def _keys(sequences: Sequence[_Sequence]) -> list[Tensor]:
    """Of each sequence, the index into T of prompt and response."""
    start, keys, prompt_of_unit = 0, [], {}
    for sequence in sequences:
        queries, _ = sequence.shape
        own_L = torch.arange(start, start + queries)
        if sequence.first:
            prompt_of_unit[sequence.unit] = own_L[: len(sequence.prompt.prompt_ids)]
            keys.append(own_L)
        else:
            keys.append(torch.cat([prompt_of_unit[sequence.unit], own_L]))
        start += queries
    return keys


def _tokens(sequences: Sequence[_Sequence], keys: Sequence[Tensor]) -> PackedTokens:
    if not sequences:  # nothing to learn here: the shortest input a model accepts
        one, cu_seqlens = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
        return PackedTokens(one, one.expand(3, 1), cu_seqlens, cu_seqlens)
    segments = [(s.shape, key_L) for s, key_L in zip(sequences, keys, strict=True) if s.shape[0]]
    cu_seqlens, cu_seqlens_k = torch.tensor([(0, 0), *(shape for shape, _ in segments)]).cumsum(0).to(torch.int32).T
    prompts = [s.prompt for s in sequences if s.first]
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return PackedTokens(
        input_ids_T=torch.tensor([token for s in sequences for token in s.ids]),
        position_ids_3T=torch.cat([s.position_ids_3L for s in sequences], dim=1),
        cu_seqlens=cu_seqlens.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        kv_index_K=None if len(prompts) == len(segments) else torch.cat([key_L for _, key_L in segments]),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
    )


def _per_token(values: list[float], counts: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)


def _flat(rows: list[tuple[float, ...]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)
