"""Teacher scoring in the trainer: the frozen teacher reads the student's own tokens, on Megatron, forward only.

Reward-gated: only sequences whose KL weight is not zero are read at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vold.models.architecture import Architecture
from vold.models.language_model import build_chunks
from vold.models.weights import load_pretrained
from vold.parallel.launch import Layout
from vold.records import Batch, MicroBatch, PackedTokens
from vold.trainer.device import batch_to
from vold.trainer.pipeline import run_pipeline
from vold_kernels.linear_logprob import linear_logprob


class Teacher:
    """A text-only teacher in the student's layout. `vocab_size`: ids both models really have; `offload`: its weights
    wait in CPU memory between calls; `whole`: it gives hidden states, of which a loss makes whole distributions."""

    def __init__(
        self,
        checkpoint: Path,
        layout: Layout,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        temperature: float = 1.0,
        offload: bool = False,
        whole: bool = False,
    ):
        self._layout, self._vocab_size, self._temperature = layout, vocab_size, temperature
        self._chunks = build_chunks(Architecture.from_pretrained(checkpoint), layout, dtype)
        for chunk in self._chunks:
            load_pretrained(chunk, checkpoint)
            chunk.requires_grad_(False).eval()
        self._whole = whole
        self._waiting = _host_copies(self._chunks) if offload else []

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with logp_teacher_N filled in on the last pipeline stage, where the student's loss is: nats, 0
        where the KL weight is 0; or hidden states and head. All ranks of one model copy pass the same batch."""
        batch = batch_to(batch, self._layout.device)
        scored = [(micro.kl_weight_N != 0).nonzero()[:, 0] for micro in batch.micro_batches]
        read = [
            only_sequences(micro, rows_n)
            for micro, rows_n in zip(batch.micro_batches, scored, strict=True)
            if rows_n.numel()
        ]
        with self._present():
            read_out = _hidden_states if self._whole else self._logprobs
            found = iter(run_pipeline(self._chunks, read, self._layout, read_out, forward_only=True))
            head_UE = self._chunks[-1].head_weight().data if self._whole and self._layout.is_last_stage else None
        if not self._layout.is_last_stage:
            return batch
        return Batch(
            tuple(
                _filled(micro, rows_n, next(found) if rows_n.numel() else None, head_UE)
                for micro, rows_n in zip(batch.micro_batches, scored, strict=True)
            )
        )

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Offloaded weights are on the device inside. They never change, so nothing has to travel back."""
        for parameter, host in self._waiting:
            parameter.data = host.to(self._layout.device, non_blocking=True)
        yield
        for parameter, host in self._waiting:
            parameter.data = host

    def _logprobs(self, micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        logp_n = linear_logprob(
            hidden_TD[micro.source_N],
            self._chunks[-1].head_weight(),
            micro.target_N,
            temperature=self._temperature,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )
        return hidden_TD, logp_n


class NoTeacher:
    """For objectives without a KL term."""

    def score(self, batch: Batch) -> Batch:
        return batch


def _host_copies(chunks: Sequence[nn.Module]) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter moved to CPU memory, pinned where there is a GPU."""
    copies = []
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        host = parameter.data.cpu()
        parameter.data = host.pin_memory() if torch.cuda.is_available() else host
        copies.append((parameter, parameter.data))
    return copies


def _hidden_states(micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_TD, hidden_TD[micro.source_N]


def _filled(micro: MicroBatch, rows_n: Tensor, found_n: Tensor | None, head_UE: Tensor | None) -> MicroBatch:
    if head_UE is not None:
        return replace(micro, hidden_teacher_nE=found_n, head_teacher_UE=head_UE)
    logp_teacher_N = torch.zeros_like(micro.kl_weight_N)
    if found_n is not None:
        logp_teacher_N[rows_n] = found_n.to(logp_teacher_N)
    return replace(micro, logp_teacher_N=logp_teacher_N)


def only_sequences(micro: MicroBatch, rows_n: Tensor) -> MicroBatch:
    """The packing reduced to what predicts `rows_n` of its N targets, whole sequences, and the targets to those."""
    if micro.tokens.pixel_values is not None:
        raise ValueError("a text-only teacher cannot score sequences with images")
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
