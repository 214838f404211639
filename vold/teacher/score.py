"""Teacher scoring in the trainer: the frozen teacher reads the student's own tokens, on Megatron, forward only.

Reward-gated: only sequences whose KL weight is not zero are read at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states
from vold.models.weights import load_pretrained
from vold.parallel.launch import Layout
from vold.records import Batch, MicroBatch, PackedTokens
from vold.trainer.device import batch_to
from vold_kernels.linear_logprob import linear_logprob


class Teacher:
    """A text-only teacher in the student's layout. `vocab_size`: ids both models really have."""

    def __init__(
        self, checkpoint: Path, layout: Layout, *, dtype: torch.dtype, vocab_size: int, temperature: float = 1.0
    ):
        self._layout, self._vocab_size, self._temperature = layout, vocab_size, temperature
        self._model = build_language_model(Architecture.from_pretrained(checkpoint), layout, dtype)
        load_pretrained(self._model, checkpoint)
        self._model.requires_grad_(False).eval()

    def score(self, batch: Batch) -> Batch:
        """The batch with logp_teacher_N filled in: nats, 0 where the KL weight is 0."""
        return Batch(tuple(self._score(micro) for micro in batch_to(batch, self._layout.device).micro_batches))

    @torch.no_grad()
    def _score(self, micro: MicroBatch) -> MicroBatch:
        logp_teacher_N = torch.zeros_like(micro.kl_weight_N)
        scored_N = (micro.kl_weight_N != 0).nonzero()[:, 0]
        if scored_N.numel():
            tokens, source_N = only_sequences(micro, scored_N)
            hidden_TD = hidden_states(self._model, tokens)
            logp = linear_logprob(
                hidden_TD[source_N],
                self._model.head_weight(),
                micro.target_N[scored_N],
                temperature=self._temperature,
                tp_group=self._layout.tp_group,
                vocab_size=self._vocab_size,
            )
            logp_teacher_N[scored_N] = logp.to(logp_teacher_N)
        return replace(micro, logp_teacher_N=logp_teacher_N)


class NoTeacher:
    """For objectives without a KL term."""

    def score(self, batch: Batch) -> Batch:
        return batch


def only_sequences(micro: MicroBatch, rows_N: Tensor) -> tuple[PackedTokens, Tensor]:
    """The packing reduced to the sequences that own `rows_N`, and where those rows' source positions lie in it."""
    if micro.tokens.pixel_values is not None:
        raise ValueError("a text-only teacher cannot score sequences with images")
    lengths_B = micro.tokens.cu_seqlens.diff().long()
    kept_B = torch.zeros_like(lengths_B, dtype=torch.bool)
    kept_B[micro.sequence_N[rows_N]] = True
    kept_T = kept_B.repeat_interleave(lengths_B)
    place_T = kept_T.cumsum(0) - 1
    cu_seqlens = torch.cat([lengths_B.new_zeros(1), lengths_B[kept_B].cumsum(0)])
    tokens = PackedTokens(
        input_ids_T=micro.tokens.input_ids_T[kept_T],
        position_ids_3T=micro.tokens.position_ids_3T[:, kept_T],
        cu_seqlens=cu_seqlens.to(torch.int32),
    )
    return tokens, place_T[micro.source_N[rows_N]]
