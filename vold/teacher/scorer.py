"""Teacher scoring in the trainer: the frozen teacher reads the student's responses, on Megatron, forward only.

A text-only teacher reads the student's own tokens. A vision-language teacher reads its own prompts: its chat template,
its number of tokens for an image; only the response ids are the student's. Reward-gated: sequences whose KL weight is 0
are not read at all.

T packed tokens of a micro-batch, N of them with a target, n of these with a KL term, E hidden width of the teacher,
U head rows of a tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vold.data.packing import PromptEncoder, repack_for_teacher
from vold.models.adapters import switched_off
from vold.models.language_model import LanguageModel, open_vision_tower
from vold.models.student import load_chunks
from vold.parallel.launch import Layout
from vold.trainer.own_targets import of_all_ranks, own_rows
from vold.trainer.pipeline import Head, HeadOutput, head_output, run_pipeline
from vold.trainer.trainer import Trainer
from vold.types import Batch, MicroBatch, PackedTokens, Prompt, Sample
from vold_kernels import linear_logprob


class Teacher:
    """A frozen teacher in the student's layout.

    vocab_size: ids that both models really have. encode: how a vision-language teacher reads a prompt; None: the
    teacher reads text only, the student's tokens. patches_per_pass: see FrozenVisionTower. offload: its weights stay in
    CPU memory between calls. full_distributions: `score` fills in hidden states and head, from which the loss computes
    a full-vocabulary divergence, instead of log-probabilities. reads: whether it can read a prompt; when None, text
    alone without `encode`, and all with it. metrics: of the last batch, on every rank.
    """

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
        reads: Callable[[Prompt], bool] | None = None,
    ):
        self._layout, self._vocab_size, self._temperature = layout, vocab_size, temperature
        self._reads = reads or (lambda prompt: encode is not None or not prompt.images)
        self._encode, self._full_distributions = encode, full_distributions
        self.metrics: dict[str, float] = {}
        self._chunks = self._open_chunks(checkpoint, dtype)
        self._vision = open_vision_tower(self._chunks, checkpoint, dtype, patches_per_pass) if encode else None
        self._offloaded = _host_copies(self._parameters()) if offload else []

    def _open_chunks(self, checkpoint: Path, dtype: torch.dtype) -> list[LanguageModel]:
        chunks = load_chunks(checkpoint, self._layout, dtype)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        return chunks

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, without the KL term where the teacher cannot read their prompt: an image, and it reads text."""
        return only_read(samples, self._reads)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with logp_teacher_N filled in on the last pipeline stage, where the student's loss is: nats, 0
        where the KL weight is 0; or with hidden states and head. All ranks of one model copy pass the same batch, on
        the CPU as `pack` makes it: what the teacher reads is then planned there, and the device is not waited for."""
        with self._weights_on_device():
            return self._score(batch)

    @torch.no_grad()
    def read(self, batch: Batch, rows: Sequence[Tensor]) -> tuple[list[Tensor | None], Tensor | None]:
        """(log-probs, nats, or hidden states for `rows` of each micro-batch's targets, None without rows; [U, E] this
        rank's rows of the head). ([], None) off the last stage. Ranks call as for `score`."""
        with self._weights_on_device():
            outputs = self._read(batch, rows, self._encode, self._head())
            return outputs, self._chunks[-1].head_weight().data if self._layout.is_last_stage else None

    def _head(self) -> Head[Tensor]:
        return _hidden_states_head if self._full_distributions else self._logprob_head

    def _score(self, batch: Batch) -> Batch:
        rows = [(micro.kl_weight_N != 0).nonzero()[:, 0] for micro in batch.micro_batches]
        outputs = self._read(batch, rows, self._encode, self._head())
        batch = batch.to(self._layout.device)
        if not self._layout.is_last_stage:
            return batch
        triples = zip(batch.micro_batches, rows, outputs, strict=True)
        if not self._full_distributions:
            return Batch(tuple(_with_logp(micro, rows_n, logp_n) for micro, rows_n, logp_n in triples))
        head_UE = self._chunks[-1].head_weight().data
        return Batch(
            tuple(
                replace(micro, hidden_teacher_nE=hidden_nE, head_teacher_UE=head_UE) for micro, _, hidden_nE in triples
            )
        )

    def _read(
        self, batch: Batch, rows: Sequence[Tensor], encode: PromptEncoder | None, head: Head[Tensor]
    ) -> list[Tensor | None]:
        """`head`'s result for `rows` of each micro-batch's targets (None without rows), on the last stage: log-probs of
        all of them, hidden states of this rank's (own_targets)."""
        encode_once = encode and cache(encode)
        reduced = [
            (
                only_sequences(micro, rows_n) if encode_once is None else repack_for_teacher(micro, rows_n, encode_once)
            ).to(self._layout.device)
            for micro, rows_n in zip(batch.micro_batches, rows, strict=True)
            if rows_n.numel()
        ]
        results = run_pipeline(self._chunks, reduced, self._layout, head, vision=self._vision, forward_only=True)
        if not self._layout.is_last_stage:
            return []
        pairs = zip(reduced, results, strict=True)
        remaining = iter([of_all_ranks(micro, result, self._layout) for micro, result in pairs])
        found = [next(remaining) if rows_n.numel() else None for rows_n in rows]
        if head is not _hidden_states_head:
            return found
        triples = zip(batch.micro_batches, rows, found, strict=True)
        return [None if x is None else own_rows(micro, rows_n, x, self._layout) for micro, rows_n, x in triples]

    def _parameters(self) -> Iterator[nn.Parameter]:
        for chunk in self._chunks:
            yield from chunk.parameters()
        if self._vision is not None:
            yield from self._vision.parameters()

    @contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        """Inside, offloaded weights are on the device. They never change, so nothing has to be copied back."""
        for parameter, host in self._offloaded:
            parameter.data = host.to(self._layout.device, non_blocking=True)
        yield
        for parameter, host in self._offloaded:
            parameter.data = host

    def _logprob_head(self, micro: MicroBatch, hidden_TE: Tensor) -> HeadOutput[Tensor]:
        return head_output(hidden_TE, self._logp(hidden_TE[micro.source_N], micro.target_N))

    def _logp(self, hidden_nE: Tensor, target_n: Tensor) -> Tensor:
        logp_n = linear_logprob(
            hidden_nE,
            self._chunks[-1].head_weight(),
            target_n,
            temperature=self._temperature,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )
        return cast(Tensor, logp_n)


class BaseTeacher(Teacher):
    """The student's own base as the teacher: the trainer's chunks with their adapters switched off, no second copy.

    trainer: nothing but adapters is trained in it. Other arguments as Teacher's.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path, layout: Layout, **settings: Any):
        self._students = trainer.chunks
        settings["offload"] = False
        super().__init__(checkpoint, layout, **settings)
        self._vision = trainer.vision if self._vision is not None else None

    def _open_chunks(self, checkpoint: Path, dtype: torch.dtype) -> list[LanguageModel]:
        return self._students

    @contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        with switched_off(self._chunks):
            yield


def only_read(samples: Sequence[Sample], reads: Callable[[Prompt], bool]) -> list[Sample]:
    """The samples, with no KL term where the teacher cannot read the prompt."""
    return [sample if reads(sample.prompt) else sample.without_kl() for sample in samples]


def without_images(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with no KL term where they have images: for a teacher that reads text only."""
    return only_read(samples, lambda prompt: not prompt.images)


class NoTeacher:
    """The teacher of objectives without a KL term: changes nothing."""

    metrics: Mapping[str, float] = {}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)

    def score(self, batch: Batch) -> Batch:
        return batch


class TextTeacherBeside(NoTeacher):
    """A text-only teacher whose scores come with the rollouts. reads: see Teacher."""

    def __init__(self, reads: Callable[[Prompt], bool]):
        self._reads = reads

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        return only_read(samples, self._reads)


def _host_copies(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Move every parameter to CPU memory, pinned where there is a GPU, and return it with its copy there."""
    copies = []
    for parameter in parameters:
        host = parameter.data.cpu()
        parameter.data = host.pin_memory() if torch.cuda.is_available() else host
        copies.append((parameter, parameter.data))
    return copies


def _hidden_states_head(micro: MicroBatch, hidden_TE: Tensor) -> HeadOutput[Tensor]:
    return head_output(hidden_TE, hidden_TE[micro.source_N])


def _with_logp(micro: MicroBatch, rows_n: Tensor, logp_n: Tensor | None) -> MicroBatch:
    logp_teacher_N = torch.zeros_like(micro.kl_weight_N)
    if logp_n is not None:
        rows_n = rows_n.to(logp_teacher_N.device, non_blocking=True)
        logp_teacher_N.index_copy_(0, rows_n, logp_n.to(logp_teacher_N))
    return replace(micro, logp_teacher_N=logp_teacher_N)


def only_sequences(micro: MicroBatch, rows_n: Tensor) -> MicroBatch:
    """The micro-batch reduced to the targets `rows_n` and the tokens that predict them, which are of whole sequences.
    Raises ValueError where such a sequence has images."""
    for sequence in micro.sequence_N[rows_n].unique().tolist():
        if micro.samples_B[sequence].prompt.images:
            raise ValueError(f"{micro.samples_B[sequence].prompt.id} has images and the teacher reads text only")
    tokens, count = micro.tokens, micro.tokens.input_ids_T.numel()
    segment_T, segment_K = (
        torch.arange(len(cu) - 1, device=cu.device).repeat_interleave(cu.diff())
        for cu in (tokens.cu_seqlens, tokens.cu_seqlens_k)
    )
    # A segment is cut after its last token that predicts a target; keys ascend, so it reads none beyond.
    source_n = micro.source_N[rows_n]
    last_S = torch.full_like(tokens.cu_seqlens[1:], -1, dtype=torch.int64)
    last_S.scatter_reduce_(0, segment_T[source_n], source_n, "amax")
    index_K = torch.arange(count, device=last_S.device) if tokens.kv_index_K is None else tokens.kv_index_K
    read_K = index_K <= last_S[segment_K]
    read_T = torch.arange(count, device=last_S.device) <= last_S[segment_T]
    new_index_T = read_T.cumsum(0) - 1
    lengths_S, lengths_k_S = (
        segment[read].bincount(minlength=len(last_S))[last_S >= 0]
        for segment, read in ((segment_T, read_T), (segment_K, read_K))
    )
    tokens = PackedTokens(
        input_ids_T=tokens.input_ids_T[read_T],
        position_ids_3T=tokens.position_ids_3T[:, read_T],
        cu_seqlens=_cumulative(lengths_S),
        cu_seqlens_k=_cumulative(lengths_k_S),
        kv_index_K=None if tokens.kv_index_K is None else new_index_T[index_K[read_K]],
    )
    return replace(micro, tokens=tokens, source_N=new_index_T[source_n], target_N=micro.target_N[rows_n])


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
