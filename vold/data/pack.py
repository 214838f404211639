"""Samples -> Batch: sequences laid end to end in micro-batches of bounded length. B sequences, T tokens, N targets."""

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
    max_over_ranks: Callable[[int], int] = lambda count: count,
    encode: Encoder = encode_text,
) -> Batch:
    """Micro-batches of at most `max_tokens`, equally many on every rank, filled longest sequence first.

    A sample whose two weights are zero has no gradient: it is left out, exactly (its tokens are in the normaliser
    already). A rank with too few sequences gets micro-batches of one token and no target.
    """
    learning = [place for place, sample in enumerate(samples) if sample.pg_weight or sample.kl_weight]
    lengths = {place: len(samples[place].prompt.token_ids) + len(samples[place].response_ids) for place in learning}
    bins = _fill(lengths, max_tokens, 1)
    bins = _fill(lengths, max_tokens, max_over_ranks(len(bins)))
    return Batch(tuple(_micro_batch([(place, samples[place]) for place in places], encode) for places in bins))


def filler() -> MicroBatch:
    """A micro-batch of one token and no target: the least a model runs, without loss or gradient."""
    return _micro_batch([], encode_text)


def _fill(lengths: dict[int, int], max_tokens: int, at_least: int) -> list[list[int]]:
    """Longest first into the emptiest of k bins; k grows until everything fits."""
    count = max(at_least, -(-sum(lengths.values()) // max_tokens))
    while True:
        bins, fill = [[] for _ in range(count)], [0] * count
        for place in sorted(lengths, key=lambda place: (-lengths[place], place)):
            emptiest = fill.index(min(fill))
            bins[emptiest].append(place)
            fill[emptiest] += lengths[place]
        if max(fill) <= max_tokens or count > len(lengths):
            return bins
        count += 1


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
