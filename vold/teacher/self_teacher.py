"""The student's own moving average as its teacher (SDPO, SRPO). It reads each response behind a prompt that shows how a
sibling solved the problem, or what was wrong with the response.

N targets of a micro-batch, n of them with a KL term, E hidden width, U head rows of a tensor-parallel rank.
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
from vold.trainer.own_targets import of_all_ranks, own_rows
from vold.trainer.pipeline import HeadOutput, head_output, run_pipeline
from vold.trainer.weight_average import WeightAverage
from vold.types import Batch, Hint, MicroBatch, Prompt, Sample
from vold_kernels import linear_logprob

Condition = Callable[[Prompt, Hint], Prompt]
"""(prompt, hint) -> the prompt that the self-teacher reads"""
TeacherRows = tuple[Tensor, Tensor]
"""hidden_nE and weight_n of the tokens with a KL term"""


class SelfTeacher:
    """Scores with the student's average instead of a checkpoint; see Teacher.

    confident: multiply KL weights by SRPO's, from the self-teacher's entropy. max_tokens, temperature, vocab_size: the
    trainer's.
    """

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
        self._head_options = {"temperature": temperature, "tp_group": layout.tp_group, "vocab_size": vocab_size}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, without the KL term where their prompt has images: hints go with text only."""
        return without_images(samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with hidden states and head of the self-teacher on the last pipeline stage, and with its KL weights
        by confidence where that is on. All ranks of one model copy pass the same batch; the mean confidence is over all
        copies."""
        batch = batch.to(self._layout.device)
        taught = [sample for micro in batch.micro_batches for sample in micro.samples_B if sample.kl_weight]
        hinted = [self._hinted(sample) for sample in taught]
        packed = pack(hinted, max_tokens=self._max_tokens).to(self._layout.device)
        results = run_pipeline(self._chunks, packed.micro_batches, self._layout, self._head, forward_only=True)
        if not self._layout.is_last_stage:
            return batch
        rows_of: dict[int, TeacherRows] = {}
        for micro, rows in zip(packed.micro_batches, results, strict=True):
            hidden_NE, weight_N = (of_all_ranks(micro, values_n, self._layout) for values_n in rows)
            sequences = [(sample, micro.sequence_N == row) for row, sample in enumerate(micro.sample_B)]
            rows_of |= {sample: (hidden_NE[rows_N], weight_N[rows_N]) for sample, rows_N in sequences}
        ordered = iter([rows_of[index] for index in range(len(taught))])
        scored = [
            self._with_hidden_states(micro, [next(ordered) for s in micro.samples_B if s.kl_weight])
            for micro in batch.micro_batches
        ]
        return Batch(tuple(self._with_confidence(scored) if self._confident else [micro for micro, _ in scored]))

    def _hinted(self, sample: Sample) -> Sample:
        assert sample.hint is not None, "the objective gives every sample with a KL term a hint"
        return replace(sample, prompt=self._condition(sample.prompt, sample.hint), experts=None)

    def _head(self, micro: MicroBatch, hidden_TE: Tensor) -> HeadOutput[TeacherRows]:
        """Hidden states and confidence at the targets."""
        hidden_NE = hidden_TE[micro.source_N]
        weight_N = torch.ones_like(micro.kl_weight_N)
        if self._confident:
            head_UE = self._chunks[-1].head_weight()
            _, entropy_N = linear_logprob(hidden_NE, head_UE, micro.target_N, return_entropy=True, **self._head_options)
            weight_N = confidence(entropy_N)
        return head_output(hidden_TE, (hidden_NE, weight_N))

    def _with_hidden_states(self, micro: MicroBatch, rows: list[TeacherRows]) -> tuple[MicroBatch, Tensor]:
        """The micro-batch with the teacher's hidden states, and confidence_n. `rows`: of its samples with a KL term, in
        the order of its tokens."""
        if not rows:
            return micro, micro.kl_weight_N.new_zeros(0)
        hidden_nE, weight_n = (torch.cat(part) for part in zip(*rows, strict=True))
        hidden_nE = own_rows(micro, micro.kl_weight_N != 0, hidden_nE, self._layout)
        head_UE = self._chunks[-1].head_weight().data
        return replace(micro, hidden_teacher_nE=hidden_nE, head_teacher_UE=head_UE), weight_n

    def _with_confidence(self, scored: list[tuple[MicroBatch, Tensor]]) -> list[MicroBatch]:
        """Multiply KL weights by the confidence, divided by its mean over the update: all micro-batches of all
        replicas."""
        weight_n = torch.cat([weight_n for _, weight_n in scored]).double()
        total = torch.stack([weight_n.sum(), weight_n.new_tensor(len(weight_n))])
        dist.all_reduce(total, group=self._layout.dp_group)
        mean = total[0] / total[1].clamp(min=1)
        weighted = []
        for micro, weight_n in scored:
            kl_weight_N = micro.kl_weight_N.clone()
            kl_weight_N[kl_weight_N != 0] *= (weight_n / mean).to(kl_weight_N)
            weighted.append(replace(micro, kl_weight_N=kl_weight_N))
        return weighted
