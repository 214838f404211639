"""The student's own average as its teacher (SDPO, SRPO): it reads each response behind a prompt that shows how a
sibling solved the problem, or says what was wrong. E hidden width, n tokens that are distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from vold.data.packing import pack
from vold.objectives.self_distillation import confidence
from vold.parallel.launch import Layout
from vold.teacher.scorer import without_images
from vold.trainer.device import batch_to
from vold.trainer.pipeline import run_pipeline
from vold.trainer.weight_average import WeightAverage
from vold.types import Batch, Hint, MicroBatch, Prompt, Sample
from vold_kernels import linear_logprob

Condition = Callable[[Prompt, Hint], Prompt]
"""(prompt, hint) -> the prompt that the self-teacher reads"""


class SelfTeacher:
    """`confident`: SRPO's weights by the self-teacher's entropy. max_tokens, temperature, vocab_size: the trainer's."""

    metrics: Mapping[str, float] = {}

    def __init__(
        self,
        average: WeightAverage,
        layout: Layout,
        condition: Condition,
        *,
        max_tokens: int,
        temperature: float,
        vocab_size: int,
        confident: bool,
    ):
        self._chunks, self._layout, self._condition = average.chunks, layout, condition
        self._max_tokens, self._confident = max_tokens, confident
        self._head = {"temperature": temperature, "tp_group": layout.tp_group, "vocab_size": vocab_size}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, without the KL term where they have images: a hint is shown beside text only."""
        return without_images(samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with hidden states and head of the self-teacher on the last pipeline stage, and its KL weights by
        confidence where asked for. All ranks of one model copy pass the same batch; the mean is over all copies."""
        batch = batch_to(batch, self._layout.device)
        taught = [sample for micro in batch.micro_batches for sample in micro.samples_B if sample.kl_weight]
        shown = [replace(s, prompt=self._condition(s.prompt, s.hint)) for s in taught]
        read = batch_to(pack(shown, max_tokens=self._max_tokens), self._layout.device)
        found = run_pipeline(self._chunks, read.micro_batches, self._layout, self._read, forward_only=True)
        if not self._layout.is_last_stage:
            return batch
        by_place = {place: rows for part in found for place, rows in part.items()}
        states = iter([by_place[place] for place in range(len(taught))])
        filled = [
            self._filled(micro, [next(states) for s in micro.samples_B if s.kl_weight]) for micro in batch.micro_batches
        ]
        return Batch(tuple(self._weighted(filled) if self._confident else [micro for micro, _ in filled]))

    def _read(self, micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Sample place -> hidden states and confidence at its tokens."""
        hidden_NE = hidden_TD[micro.source_N]
        weight_N = torch.ones_like(micro.kl_weight_N)
        if self._confident:
            head_UE = self._chunks[-1].head_weight()
            weight_N = confidence(
                linear_logprob(hidden_NE, head_UE, micro.target_N, return_entropy=True, **self._head)[1]
            )
        rows = ((place, micro.sequence_N == row) for row, place in enumerate(micro.sample_B))
        return hidden_TD, {place: (hidden_NE[rows_N], weight_N[rows_N]) for place, rows_N in rows}

    def _filled(self, micro: MicroBatch, states: list[tuple[Tensor, Tensor]]) -> tuple[MicroBatch, Tensor]:
        """A micro-batch's tokens are in the order of its samples, and so are the n that are distilled."""
        if not states:
            return micro, micro.kl_weight_N.new_zeros(0)
        hidden_nE, weight_n = (torch.cat(part) for part in zip(*states, strict=True))
        head_UE = self._chunks[-1].head_weight().data
        return replace(micro, hidden_teacher_nE=hidden_nE, head_teacher_UE=head_UE), weight_n

    def _weighted(self, filled: list[tuple[MicroBatch, Tensor]]) -> list[MicroBatch]:
        """KL weights times the self-teacher's, whose mean over the update is 1: all micro-batches, all replicas."""
        found_n = torch.cat([weight_n for _, weight_n in filled]).double()
        total = torch.stack([found_n.sum(), found_n.new_tensor(len(found_n))])
        dist.all_reduce(total, group=self._layout.dp_group)
        mean = total[0] / total[1].clamp(min=1)
        weighted = []
        for micro, weight_n in filled:
            kl_weight_N = micro.kl_weight_N.clone()
            kl_weight_N[kl_weight_N != 0] *= (weight_n / mean).to(kl_weight_N)
            weighted.append(replace(micro, kl_weight_N=kl_weight_N))
        return weighted
