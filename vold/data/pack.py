"""Samples -> Batch: sequences laid end to end in micro-batches of bounded length, divided among the data-parallel
replicas so that all have equally much work. B sequences, T tokens, N targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vold.records import Batch, MicroBatch, PackedTokens, Prompt, Sample


@dataclass(frozen=True)
class Encoded:
    """A prompt as a model reads it: image-pad ids expanded, positions [3, L] of prompt and `response` tokens."""

    prompt_ids: Sequence[int]
    position_ids_3L: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


Encoder = Callable[[Prompt, Sequence[int]], Encoded]


@dataclass(frozen=True)
class Replicas:
    """`count` data-parallel copies of the model share a step; this is number `rank`. `cost`: work that a sequence of so
    many tokens is, in any unit."""

    count: int = 1
    rank: int = 0
    cost: Callable[[int], float] = float


def encode_text(prompt: Prompt, response_ids: Sequence[int]) -> Encoded:
    """Text only: positions count up, the same in all three planes."""
    if prompt.images:
        raise ValueError(f"{prompt.id} has images; this stage reads text only")
    length = len(prompt.token_ids) + len(response_ids)
    return Encoded(prompt.token_ids, torch.arange(length).expand(3, length))


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
    learning = [place for place, sample in enumerate(samples) if sample.pg_weight or sample.kl_weight]
    lengths = {place: len(samples[place].prompt.token_ids) + len(samples[place].response_ids) for place in learning}
    mine = _divide(lengths, max_tokens, replicas)[replicas.rank]
    return Batch(tuple(_micro_batch([(place, samples[place]) for place in places], encode) for places in mine))


def filler() -> MicroBatch:
    """A micro-batch of one token and no target: the least a model runs, without loss or gradient."""
    return _micro_batch([], encode_text)


def _divide(lengths: dict[int, int], max_tokens: int, replicas: Replicas) -> list[list[list[int]]]:
    """Places by replica and micro-batch. Costliest sequence first into the micro-batch with the least work that has
    room; micro-batches are added, one a replica, until everything fits. Then the costliest are dealt out to the
    replicas to and fro, which evens their sums."""
    each = max(1, -(-sum(lengths.values()) // (max_tokens * replicas.count)))
    while (bins := _fill(lengths, max_tokens, each * replicas.count, replicas.cost)) is None:
        each += 1
    bins.sort(key=lambda places: -sum(replicas.cost(lengths[place]) for place in places))
    order = [*range(replicas.count), *reversed(range(replicas.count))]
    shares: list[list[list[int]]] = [[] for _ in range(replicas.count)]
    for number, places in enumerate(bins):
        shares[order[number % len(order)]].append(places)
    return shares


def _fill(lengths: dict[int, int], max_tokens: int, count: int, cost: Callable[[int], float]) -> list[list[int]] | None:
    """The places in `count` bins of at most `max_tokens` (a longer sequence lies alone), or None: they do not fit."""
    bins, fill, work = [[] for _ in range(count)], [0] * count, [0.0] * count
    for place in sorted(lengths, key=lambda place: (-lengths[place], place)):
        room = [b for b in range(count) if not bins[b] or fill[b] + lengths[place] <= max_tokens]
        if not room:
            return None
        emptiest = min(room, key=work.__getitem__)
        bins[emptiest].append(place)
        fill[emptiest] += lengths[place]
        work[emptiest] += cost(lengths[place])
    return bins


def _micro_batch(placed: list[tuple[int, Sample]], encode: Encoder) -> MicroBatch:
    samples = [sample for _, sample in placed]
    encoded = [encode(sample.prompt, sample.response_ids) for sample in samples]
    counts = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.int64)
    lengths = [len(e.prompt_ids) + len(s.response_ids) for e, s in zip(encoded, samples, strict=True)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = [torch.tensor([*e.prompt_ids, *s.response_ids]) for e, s in zip(encoded, samples, strict=True)]
    sources = [  # the hidden state one position earlier predicts a token
        torch.arange(len(s.response_ids)) + start + len(e.prompt_ids) - 1
        for start, e, s in zip(starts.tolist(), encoded, samples, strict=False)
    ]
    rollout_logps = [s.logp_rollout for s in samples if s.logp_rollout is not None]
    return MicroBatch(
        tokens=_tokens(ids, encoded, starts),
        source_N=torch.cat(sources) if sources else torch.zeros(0, dtype=torch.int64),
        target_N=torch.tensor([token for s in samples for token in s.response_ids], dtype=torch.int64),
        sequence_N=torch.arange(len(samples)).repeat_interleave(counts),
        sample_B=tuple(place for place, _ in placed),
        advantage_N=_per_token([s.advantage for s in samples], counts),
        pg_weight_N=_per_token([s.pg_weight for s in samples], counts),
        kl_weight_N=_per_token([s.kl_weight for s in samples], counts),
        logp_rollout_N=_flat(rollout_logps) if samples and len(rollout_logps) == len(samples) else None,
    )


def _tokens(ids: list[Tensor], encoded: list[Encoded], starts: Tensor) -> PackedTokens:
    if not ids:  # nothing to learn here: the shortest input a model accepts
        one = torch.zeros(1, dtype=torch.int64)
        return PackedTokens(one, one.expand(3, 1), torch.tensor([0, 1], dtype=torch.int32))
    pixels = [e.pixel_values for e in encoded if e.pixel_values is not None]
    grids = [e.image_grid_thw for e in encoded if e.image_grid_thw is not None]
    return PackedTokens(
        input_ids_T=torch.cat(ids),
        position_ids_3T=torch.cat([e.position_ids_3L for e in encoded], dim=1),
        cu_seqlens=starts.to(torch.int32),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
    )


def _per_token(values: list[float], counts: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)


def _flat(rows: list[tuple[float, ...]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)
