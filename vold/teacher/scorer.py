"""Teacher scoring in the trainer: the frozen teacher reads the student's responses, on Megatron, forward only.

A text-only teacher reads the student's own tokens. One that sees reads prompts of its own: its chat template, its
number of tokens for an image; only the response ids are the student's.
Reward-gated: only sequences whose KL weight is not zero are read at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vold.data.packing import PromptEncoder, repack_for_teacher
from vold.models.architecture import Architecture
from vold.models.language_model import build_chunks, open_vision_tower
from vold.models.weights import load_pretrained
from vold.parallel.launch import Layout
from vold.trainer.device import batch_to, micro_batch_to
from vold.trainer.pipeline import Head, run_pipeline
from vold.types import Batch, MicroBatch, PackedTokens, Sample
from vold_kernels import linear_logprob


class Teacher:
    """A teacher in the student's layout. `vocab_size`: ids both models really have; `encode`: how a teacher that sees
    reads a prompt, None where it reads the student's text; `patches_per_pass`: see FrozenVisionTower; `offload`: its
    weights wait in CPU memory between calls; `full_distributions`: it gives hidden states, of which a loss makes whole
    distributions. `metrics`: what it has to say of the last batch, on every rank."""

    def __init__(
        self,
        checkpoint: Path,
        layout: Layout,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        temperature: float = 1.0,
        encode: PromptEncoder | None = None,
        patches_per_pass: int | None = None,
        offload: bool = False,
        full_distributions: bool = False,
    ):
        self._layout, self._vocab_size, self._temperature = layout, vocab_size, temperature
        self._encode = encode
        self.metrics: dict[str, float] = {}
        self._chunks = build_chunks(Architecture.from_pretrained(checkpoint), layout, dtype)
        for chunk in self._chunks:
            load_pretrained(chunk, checkpoint)
            chunk.requires_grad_(False).eval()
        self._full_distributions = full_distributions
        self._vision = open_vision_tower(self._chunks, checkpoint, dtype, patches_per_pass) if encode else None
        self._waiting = _host_copies(self._weights()) if offload else []

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, without the KL term where they show an image to a teacher that reads text only."""
        return list(samples) if self._encode is not None else without_images(samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with logp_teacher_N filled in on the last pipeline stage, where the student's loss is: nats, 0
        where the KL weight is 0; or hidden states and head. All ranks of one model copy pass the same batch."""
        with self._present():
            return self._scored(batch_to(batch, self._layout.device))

    def _scored(self, batch: Batch) -> Batch:
        scored = [(micro.kl_weight_N != 0).nonzero()[:, 0] for micro in batch.micro_batches]
        found = self._read(batch, scored, self._encode, _hidden_states if self._full_distributions else self._logprobs)
        if not self._layout.is_last_stage:
            return batch
        head_UE = self._chunks[-1].head_weight().data if self._full_distributions else None
        return Batch(tuple(map(partial(_filled, head_UE=head_UE), batch.micro_batches, scored, found)))

    def _read(
        self, batch: Batch, rows: Sequence[Tensor], encode: PromptEncoder | None, read_out: Head[Tensor]
    ) -> list[Tensor | None]:
        """What `read_out` finds for these rows of each micro-batch's targets, None without rows; on the last stage."""
        encode = encode and cache(encode)
        read = [
            only_sequences(micro, rows_n)
            if encode is None
            else micro_batch_to(repack_for_teacher(micro, rows_n, encode), self._layout.device)
            for micro, rows_n in zip(batch.micro_batches, rows, strict=True)
            if rows_n.numel()
        ]
        found = run_pipeline(self._chunks, read, self._layout, read_out, forward_only=True, vision=self._vision)
        left = iter(found)
        return [next(left) if rows_n.numel() else None for rows_n in rows] if self._layout.is_last_stage else []

    def _weights(self) -> Iterator[nn.Parameter]:
        for chunk in self._chunks:
            yield from chunk.parameters()
        if self._vision is not None:
            yield from self._vision.parameters()

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Offloaded weights are on the device inside. They never change, so nothing has to travel back."""
        for parameter, host in self._waiting:
            parameter.data = host.to(self._layout.device, non_blocking=True)
        yield
        for parameter, host in self._waiting:
            parameter.data = host

    def _logprobs(self, micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_TD, self._logp(hidden_TD[micro.source_N], micro.target_N)

    def _logp(self, hidden_nE: Tensor, target_n: Tensor) -> Tensor:
        return linear_logprob(
            hidden_nE,
            self._chunks[-1].head_weight(),
            target_n,
            temperature=self._temperature,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )


def without_images(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with no KL term where they have images: for a teacher that reads text only."""
    return [sample.without_kl() if sample.prompt.images else sample for sample in samples]


class NoTeacher:
    """For objectives without a KL term."""

    metrics: Mapping[str, float] = {}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)

    def score(self, batch: Batch) -> Batch:
        return batch


def _host_copies(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter moved to CPU memory, pinned where there is a GPU."""
    copies = []
    for parameter in parameters:
        host = parameter.data.cpu()
        parameter.data = host.pin_memory() if torch.cuda.is_available() else host
        copies.append((parameter, parameter.data))
    return copies


def _hidden_states(micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_TD, hidden_TD[micro.source_N]


def _filled(micro: MicroBatch, rows_n: Tensor, found_n: Tensor | None, *, head_UE: Tensor | None) -> MicroBatch:
    if head_UE is not None:
        return replace(micro, hidden_teacher_nE=found_n, head_teacher_UE=head_UE)
    logp_teacher_N = torch.zeros_like(micro.kl_weight_N)
    if found_n is not None:
        logp_teacher_N[rows_n] = found_n.to(logp_teacher_N)
    return replace(micro, logp_teacher_N=logp_teacher_N)


def only_sequences(micro: MicroBatch, rows_n: Tensor) -> MicroBatch:
    """The packing reduced to what predicts `rows_n` of its N targets, whole sequences, and the targets to those."""
    for sequence in micro.sequence_N[rows_n].unique().tolist():
        if micro.samples_B[sequence].prompt.images:
            raise ValueError(f"{micro.samples_B[sequence].prompt.id} has images and the teacher reads text only")
    tokens, count = micro.tokens, micro.tokens.input_ids_T.numel()
    segment_T, segment_K = (
        torch.arange(len(cu) - 1, device=cu.device).repeat_interleave(cu.diff())
        for cu in (tokens.cu_seqlens, tokens.cu_seqlens_k)
    )
    # A segment is read up to the last state that predicts something; its keys ascend, so that is what it reads.
    source_n = micro.source_N[rows_n]
    last_S = torch.full_like(tokens.cu_seqlens[1:], -1, dtype=torch.int64)
    last_S.scatter_reduce_(0, segment_T[source_n], source_n, "amax")
    index_K = torch.arange(count, device=last_S.device) if tokens.kv_index_K is None else tokens.kv_index_K
    read_K = index_K <= last_S[segment_K]
    read_T = torch.arange(count, device=last_S.device) <= last_S[segment_T]
    place_T = read_T.cumsum(0) - 1
    lengths_S, lengths_k_S = (
        segment[read].bincount(minlength=len(last_S))[last_S >= 0]
        for segment, read in ((segment_T, read_T), (segment_K, read_K))
    )
    tokens = PackedTokens(
        input_ids_T=tokens.input_ids_T[read_T],
        position_ids_3T=tokens.position_ids_3T[:, read_T],
        cu_seqlens=_cumulative(lengths_S),
        cu_seqlens_k=_cumulative(lengths_k_S),
        kv_index_K=None if tokens.kv_index_K is None else place_T[index_K[read_K]],
    )
    return replace(micro, tokens=tokens, source_N=place_T[source_n], target_N=micro.target_N[rows_n])


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
