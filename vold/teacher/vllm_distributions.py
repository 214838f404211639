"""Whole distributions from a teacher in vLLM, and the most probable ids of one behind a server, when a batch is packed.

vLLM's engines hand over the hidden states of the scored tokens, the trainer has the head, and the fused divergence
works as with a teacher in the trainer, exactly. Neither side ever holds logits [tokens, vocabulary] of more than a
chunk.

Bytes on the wire: 2 x E a token in bf16 (4/3 of it in HTTP's JSON), whatever the vocabulary. N targets of a
micro-batch, n of them with a KL term, L tokens of one response, E hidden width of the teacher, U head rows of a
tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vold.config.schema import OpenaiConfig, VllmConfig
from vold.models.head import load_head
from vold.models.tokenizer import load_tokenizer
from vold.parallel.launch import Layout
from vold.rollout.vllm.engines import EngineOutput, Engines, Request, Sizes, load_sizes
from vold.teacher.scorer import only_read
from vold.teacher.vllm import PROBE_TEXT, open_scoring_engines, warn_of_missing
from vold.trainer.own_targets import own_rows
from vold.types import Batch, MicroBatch, Prompt, Sample
from vold_kernels import linear_logprob

Key = tuple[int, int]
"""(index of a micro-batch, index of one of its sequences)"""
PROBE_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats; greatest mean difference of the two ways. vLLM rounds a head's logits to the engine's dtype, the trainer's
kernels do not."""


class AskedTeacher:
    """A teacher in an engine that is asked about a step's batch when it is packed; see Teacher.

    Opened by every rank at the same time. Of each model copy the first rank of the last pipeline stage asks, and the
    stage's others get what it was answered. images: sizes of what it reads, None for text alone. view: what it reads,
    see TeacherView.
    """

    def __init__(self, engines: Engines, images: Sizes | None, layout: Layout, view: Callable[[Prompt], Prompt]):
        self._engines, self._images, self._layout, self._view = engines, images, layout, view
        self.metrics: dict[str, float] = {}

    def _request(self, prompt: Prompt, sample: Sample) -> Request:
        """What is asked about a response to the prompt that the teacher reads."""
        raise NotImplementedError

    def _rows(self, output: EngineOutput) -> Tensor | None:
        """[L, ·] of an answer, a row for each token."""
        raise NotImplementedError

    def _empty_row(self) -> Tensor:
        """One row, in the dtype and on the device that `_attach` wants."""
        raise NotImplementedError

    def _attach(self, micro: MicroBatch, rows_n: Tensor | None) -> MicroBatch:
        """The micro-batch with the rows of its n tokens with a KL term."""
        raise NotImplementedError

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """See Teacher."""
        return only_read(samples, lambda prompt: self._images is not None or not self._view(prompt).images)

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """The batch with what the teacher answered on the last pipeline stage. A response without an answer loses all
        terms of its loss, as it does where log-probs do not come; metric teacher_failed counts them. All ranks of one
        model copy pass the same batch."""
        if not self._layout.is_last_stage:
            self.metrics = self._layout.from_last_stage(None)
            return batch.to(self._layout.device)
        found = self._from_first(self._ask(batch) if self._layout.is_first_of_stage else None, batch)
        failed = torch.tensor(float(sum(rows is None for rows in found.values())), device=self._layout.device)
        dist.all_reduce(failed, group=self._layout.dp_group)
        self.metrics = self._layout.from_last_stage({"teacher_failed": failed.item()})
        return Batch(
            tuple(
                self._with_answers(micro, {sequence: rows for (m, sequence), rows in found.items() if m == number})
                for number, micro in enumerate(batch.micro_batches)
            )
        )

    def close(self) -> None:
        """Nothing runs between two calls of `score`."""

    def _ask(self, batch: Batch) -> dict[Key, Tensor | None]:
        """The rows of each response with a KL term, on the CPU; None where the engines failed."""
        keys, requests, prompts = _keys(batch), [], []
        for number, sequence in keys:
            sample = batch.micro_batches[number].samples_B[sequence]
            requests.append(self._request(self._view(sample.prompt), sample))
            prompts.append(sample.prompt)
        found: dict[Key, Tensor | None] = {}
        for index, output in self._engines.stream(requests):
            found[keys[index]] = None if output is None else self._rows(output)
            if found[keys[index]] is None:
                warn_of_missing(prompts[index])
        return found

    def _from_first(self, found: dict[Key, Tensor | None] | None, batch: Batch) -> dict[Key, Tensor | None]:
        """The asking rank's answers on every rank of its pipeline stage, in the dtype and on the device of
        `_empty_row`."""
        layout, keys, row = self._layout, _keys(batch), self._empty_row()
        if found is not None:
            found = {key: None if rows is None else rows.to(row) for key, rows in ((key, found[key]) for key in keys)}
        if layout.tp * layout.cp == 1:
            assert found is not None
            return found
        source = dist.get_global_rank(layout.stage_group, 0)
        box = [None if found is None else [rows is None for rows in found.values()]]
        dist.broadcast_object_list(box, src=source, group=layout.stage_group, device=layout.device)
        assert box[0] is not None
        shared: dict[Key, Tensor | None] = {}
        for (number, sequence), missing in zip(keys, box[0], strict=True):
            length = len(batch.micro_batches[number].samples_B[sequence].response_ids)
            rows = found[number, sequence] if found else row.new_empty(length, *row.shape)
            if not missing:
                assert rows is not None
                dist.broadcast(rows, src=source, group=layout.stage_group)
            shared[number, sequence] = None if missing else rows
        return shared

    def _with_answers(self, micro: MicroBatch, found: dict[int, Tensor | None]) -> MicroBatch:
        """The micro-batch with the teacher's rows; sequences without theirs have no weight."""
        failed = torch.tensor([sequence for sequence, rows in found.items() if rows is None], dtype=torch.int64)
        if len(failed):
            lost_N = torch.isin(micro.sequence_N.cpu(), failed)
            micro = replace(
                micro,
                pg_weight_N=micro.pg_weight_N.masked_fill(lost_N, 0.0),
                kl_weight_N=micro.kl_weight_N.masked_fill(lost_N, 0.0),
                reference_weight_N=_masked(micro.reference_weight_N, lost_N),
            )
        rows = [rows_L for _, rows_L in sorted(found.items()) if rows_L is not None]
        micro = micro.to(self._layout.device)
        scored_N = micro.kl_weight_N != 0
        return self._attach(micro, own_rows(micro, scored_N, torch.cat(rows), self._layout) if rows else None)


class VllmDistributions(AskedTeacher):
    """A teacher in vLLM for an objective with a divergence over the vocabulary; see Teacher.

    student_rows: rows of the student's head, by which the teacher's is divided. Raises ValueError where hidden states
    and head do not give the engine's own log-probs."""

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
        view: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ):
        self._checkpoint, self._dtype = checkpoint, dtype
        self._head_options: dict[str, Any] = {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "tp_group": layout.tp_group,
        }
        self._head_UE = load_head(checkpoint, layout, dtype, student_rows) if layout.is_last_stage else None
        engines = open_scoring_engines(checkpoint, settings, temperature=temperature, dtype=dtype)
        super().__init__(engines, load_sizes(checkpoint), layout, view)
        if self._head_UE is not None:
            self._compare(self._head_UE)

    def _request(self, prompt: Prompt, sample: Sample) -> Request:
        return Request.reading(prompt, sample.response_ids, self._images)

    def _rows(self, output: EngineOutput) -> Tensor | None:
        return output.hidden_nE

    def _empty_row(self) -> Tensor:
        assert self._head_UE is not None
        return self._head_UE.new_empty(self._head_UE.shape[1])

    def _attach(self, micro: MicroBatch, rows_nE: Tensor | None) -> MicroBatch:
        return replace(micro, hidden_teacher_nE=rows_nE, head_teacher_UE=self._head_UE)

    def _compare(self, head_UE: Tensor) -> None:
        """Raise ValueError where the log-probs of hidden states and head are not those that the engine gives."""
        ids = load_tokenizer(self._checkpoint).encode(PROBE_TEXT, add_special_tokens=False)
        prompt, response = Prompt("probe", np.asarray(ids[:1], np.int32), ""), ids[1:]
        box: list = [None]
        if self._layout.is_first_of_stage:
            requests = [Request.scoring(prompt, response, None), Request.reading(prompt, response, None)]
            outputs = dict(self._engines.stream(requests))
            if outputs[0] and outputs[1] and outputs[1].hidden_nE is not None:
                box = [(outputs[0].scored, outputs[1].hidden_nE)]
        if self._layout.tp * self._layout.cp > 1:
            group = self._layout.stage_group
            source = dist.get_global_rank(group, 0)
            dist.broadcast_object_list(box, src=source, group=group, device=self._layout.device)
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


class TopTeacher(AskedTeacher):
    """A teacher behind an OpenAI-compatible server (`OpenaiServer`) for a divergence over its `top_k` most probable ids
    and one bucket for the rest; see Teacher. It reads text only. Raises ValueError where the server does not give
    them."""

    def __init__(
        self,
        checkpoint: Path,
        settings: OpenaiConfig,
        layout: Layout,
        *,
        top_k: int,
        view: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ):
        engines = open_scoring_engines(checkpoint, settings, temperature=1.0, dtype=None, top_k=top_k)
        super().__init__(engines, None, layout, view)
        self._top_k = top_k

    def _request(self, prompt: Prompt, sample: Sample) -> Request:
        return Request.scoring(prompt, sample.response_ids, None)

    def _rows(self, output: EngineOutput) -> Tensor | None:
        assert output.top is not None
        ids_Lk, logp_Lk = output.top
        return torch.cat([ids_Lk.double(), logp_Lk.double()], dim=1)

    def _empty_row(self) -> Tensor:
        return torch.empty(2 * self._top_k, dtype=torch.float64, device=self._layout.device)

    def _attach(self, micro: MicroBatch, rows_n: Tensor | None) -> MicroBatch:
        if rows_n is None:
            return replace(micro, top_teacher=None)
        ids_nk, logp_nk = rows_n.chunk(2, dim=1)
        return replace(micro, top_teacher=(ids_nk.long(), logp_nk.float()))


def _masked(weight_N: Tensor | None, lost_N: Tensor) -> Tensor | None:
    return None if weight_N is None else weight_N.masked_fill(lost_N.to(weight_N.device), 0.0)


def _keys(batch: Batch) -> list[Key]:
    """The responses with a KL term. Their tokens all have one, except what another teacher of the batch scores."""
    return [
        (number, sequence)
        for number, micro in enumerate(batch.micro_batches)
        for sequence in micro.sequence_N[micro.kl_weight_N != 0].unique().tolist()
    ]
