"""Whole distributions from a teacher in vLLM: its engines hand over the hidden states of the scored tokens, the trainer
has its head, and the fused divergence works as with a teacher in the trainer, exactly. Neither side ever holds logits
[tokens, vocabulary] of more than a chunk.

Bytes on the wire: 2 x E a token in bf16 (4/3 of it in HTTP's JSON), whatever the vocabulary. N targets of a
micro-batch, n of them with a KL term, L tokens of one response, E hidden width of the teacher, U head rows of a
tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.models.head import load_head
from vold.models.tokenizer import load_tokenizer
from vold.parallel.launch import Layout
from vold.rollout.vllm.engines import Request, load_sizes
from vold.teacher.scorer import without_images
from vold.teacher.vllm import open_scoring_engines, warn_of_missing
from vold.types import Batch, MicroBatch, Prompt, Sample
from vold_kernels import linear_logprob

Key = tuple[int, int]
"""(index of a micro-batch, index of one of its sequences)"""
PROBE_TEXT = "One teacher, two ways to its log-probs: 1, 2, 3."
PROBE_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats; greatest mean difference of the two ways. vLLM rounds a head's logits to the engine's dtype, the trainer's
kernels do not."""


class VllmDistributions:
    """A teacher in vLLM for an objective with a divergence over the vocabulary; see Teacher.

    Opened by every rank at the same time. Of each model copy the first tensor-parallel rank of the last pipeline stage
    asks, and the others of its group get what it was answered. student_rows: rows of the student's head, by which the
    teacher's is divided. Raises ValueError where hidden states and head do not give the engine's own log-probs.
    """

    def __init__(
        self,
        checkpoint: Path,
        settings: VllmConfig,
        layout: Layout,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        student_rows: int,
        temperature: float = 1.0,
    ):
        self._layout, self._checkpoint, self._dtype = layout, checkpoint, dtype
        self._images = load_sizes(checkpoint)
        self._head_options: dict[str, Any] = {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "tp_group": layout.tp_group,
        }
        self._head_UE = load_head(checkpoint, layout, dtype, student_rows) if layout.is_last_stage else None
        self._engines = open_scoring_engines(checkpoint, settings, temperature=temperature, dtype=dtype)
        self.metrics: dict[str, float] = {}
        if self._head_UE is not None:
            self._compare(self._head_UE)

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """See Teacher."""
        return list(samples) if self._images is not None else without_images(samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with hidden states and head on the last pipeline stage. A response whose hidden states did not come
        loses both terms of its loss, as it does where log-probs do not come; metric teacher_failed counts them. All
        ranks of one model copy pass the same batch."""
        if not self._layout.is_last_stage:
            self.metrics = self._layout.from_last_stage(None)
            return batch.to(self._layout.device)
        found = self._from_first(self._ask(batch) if self._layout.tp_rank == 0 else None, batch)
        failed = torch.tensor(float(sum(rows is None for rows in found.values())), device=self._layout.device)
        dist.all_reduce(failed, group=self._layout.dp_group)
        self.metrics = self._layout.from_last_stage({"teacher_failed": failed.item()})
        return Batch(
            tuple(
                self._with_hidden_states(
                    micro, {sequence: rows for (m, sequence), rows in found.items() if m == number}
                )
                for number, micro in enumerate(batch.micro_batches)
            )
        )

    def close(self) -> None:
        """Nothing runs between two calls of `score`."""

    def _ask(self, batch: Batch) -> dict[Key, Tensor | None]:
        """[L, E] of each response with a KL term, on the CPU; None where the engines failed."""
        keys, requests, prompts = _keys(batch), [], []
        for number, sequence in keys:
            sample = batch.micro_batches[number].samples_B[sequence]
            requests.append(Request.reading(sample.prompt, sample.response_ids, self._images))
            prompts.append(sample.prompt)
        found: dict[Key, Tensor | None] = {}
        for index, output in self._engines.stream(requests):
            found[keys[index]] = None if output is None else output.hidden_nE
            if found[keys[index]] is None:
                warn_of_missing(prompts[index])
        return found

    def _from_first(self, found: dict[Key, Tensor | None] | None, batch: Batch) -> dict[Key, Tensor | None]:
        """The asking rank's answers on every rank of its tensor-parallel group, in the trainer's dtype and device."""
        layout, keys = self._layout, _keys(batch)
        if found is not None:
            found = {
                key: None if rows is None else rows.to(layout.device, self._dtype)
                for key, rows in ((key, found[key]) for key in keys)
            }
        if layout.tp == 1:
            assert found is not None
            return found
        source = dist.get_global_rank(layout.tp_group, 0)
        box = [None if found is None else [rows is None for rows in found.values()]]
        dist.broadcast_object_list(box, src=source, group=layout.tp_group, device=layout.device)
        assert box[0] is not None and self._head_UE is not None
        shared: dict[Key, Tensor | None] = {}
        for (number, sequence), missing in zip(keys, box[0], strict=True):
            length = len(batch.micro_batches[number].samples_B[sequence].response_ids)
            rows = found[number, sequence] if found else self._head_UE.new_empty(length, self._head_UE.shape[1])
            if not missing:
                assert rows is not None
                dist.broadcast(rows, src=source, group=layout.tp_group)
            shared[number, sequence] = None if missing else rows
        return shared

    def _with_hidden_states(self, micro: MicroBatch, found: dict[int, Tensor | None]) -> MicroBatch:
        """The micro-batch with the teacher's rows; sequences without theirs have no weight."""
        failed = torch.tensor([sequence for sequence, rows in found.items() if rows is None], dtype=torch.int64)
        if len(failed):
            lost_N = torch.isin(micro.sequence_N.cpu(), failed)
            micro = replace(
                micro,
                pg_weight_N=micro.pg_weight_N.masked_fill(lost_N, 0.0),
                kl_weight_N=micro.kl_weight_N.masked_fill(lost_N, 0.0),
            )
        rows = [rows_LE for _, rows_LE in sorted(found.items()) if rows_LE is not None]
        hidden_nE = torch.cat(rows) if rows else None
        return replace(micro, hidden_teacher_nE=hidden_nE, head_teacher_UE=self._head_UE).to(self._layout.device)

    def _compare(self, head_UE: Tensor) -> None:
        """Raise ValueError where the log-probs of hidden states and head are not those that the engine gives."""
        ids = load_tokenizer(self._checkpoint).encode(PROBE_TEXT, add_special_tokens=False)
        prompt, response = Prompt("probe", np.asarray(ids[:1], np.int32), ""), ids[1:]
        box: list = [None]
        if self._layout.tp_rank == 0:
            requests = [Request.scoring(prompt, response, None), Request.reading(prompt, response, None)]
            outputs = dict(self._engines.stream(requests))
            if outputs[0] and outputs[1] and outputs[1].hidden_nE is not None:
                box = [(outputs[0].scored, outputs[1].hidden_nE)]
        if self._layout.tp > 1:
            source = dist.get_global_rank(self._layout.tp_group, 0)
            dist.broadcast_object_list(box, src=source, group=self._layout.tp_group, device=self._layout.device)
        if box[0] is None:
            raise ValueError(f"teacher = {self._checkpoint}: its engine gave no hidden states, see above")
        scored, rows_nE = box[0]
        if rows_nE.shape[1] != head_UE.shape[1]:
            raise ValueError(
                f"teacher = {self._checkpoint}: the engine's hidden states are {rows_nE.shape[1]} wide and the head "
                f"{head_UE.shape[1]}: the engine serves another checkpoint"
            )
        rows_nE, target_n = rows_nE.to(head_UE), torch.tensor(response, device=head_UE.device)
        ours = cast(Tensor, linear_logprob(rows_nE, head_UE, target_n, **self._head_options))
        gap = float((ours.cpu().float() - torch.tensor(scored)).abs().mean())
        if not gap <= PROBE_LIMITS[self._dtype]:
            raise ValueError(
                f"teacher = {self._checkpoint}: log-probs of its hidden states and head are {gap:.3g} nats from the "
                "engine's own: its head is no plain matrix, or the engine serves other weights; set "
                "objective.divergence=k2"
            )


def _keys(batch: Batch) -> list[Key]:
    """The responses with a KL term. Their tokens all have one, except what another teacher of the batch scores."""
    return [
        (number, sequence)
        for number, micro in enumerate(batch.micro_batches)
        for sequence in micro.sequence_N[micro.kl_weight_N != 0].unique().tolist()
    ]
