"""The only training engine: Megatron-core, from a laptop (tp = pp = 1, gloo) to a cluster.

One step is `Trainer.step`: forward and backward over the micro-batches, one reduction, one update. The loss is the
fused `linear_policy_loss` on the hidden states of the last stage; logits never exist.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from vold.config.schema import OptimizerConfig, VisionConfig
from vold.data.packing import Replicas
from vold.models.architecture import Architecture
from vold.models.flops import segment_flops, training_flops
from vold.models.language_model import LanguageModel, build_chunks, open_vision_tower, unwrap
from vold.models.weights import export_weights, load_pretrained
from vold.objectives import Objective
from vold.parallel.launch import Layout
from vold.run.timers import PhaseTimers
from vold.trainer.device import batch_to
from vold.trainer.metrics import mean_kl, micro_batch_stats, reduce_stats, token_logps
from vold.trainer.optimizer import build_optimizer, build_schedule
from vold.trainer.pipeline import Head, ResultT, run_pipeline
from vold.trainer.weight_average import WeightAverage
from vold.types import Batch, MicroBatch, StepReport
from vold_kernels import linear_kl, linear_logprob, linear_policy_loss


class Trainer:
    """The student with its optimizer. `vocab_size`: ids both models really have; rows beyond are -inf. `objective`: its
    ratio and numbers, read by the loss; what it made of rewards is in the batches' weights. `importance_cap`: rollouts
    may be of older weights, and each token's terms get truncated importance weights (see linear_policy_loss); None:
    they are of these weights."""

    def __init__(
        self,
        student: Path,
        layout: Layout,
        optimizer: OptimizerConfig,
        *,
        steps: int,
        dtype: torch.dtype,
        vocab_size: int,
        objective: Objective = Objective(),
        temperature: float = 1.0,
        importance_cap: float | None = None,
        vision: VisionConfig = VisionConfig(),
    ):
        self._importance_cap = importance_cap
        self._layout, self._objective, self._temperature = layout, objective, temperature
        self.vocab_size = vocab_size
        self._chunks = _wrap(load_student(student, layout, dtype, train_merger=vision.train_merger))
        self._vision = open_vision_tower(self.chunks, student, dtype, vision.patches_per_pass)
        self._optimizer = build_optimizer(self._chunks, optimizer, dtype)
        self.schedule = build_schedule(self._optimizer, optimizer, steps)
        self._max_bad_steps, self._bad_steps = optimizer.max_bad_steps, 0
        self.average: WeightAverage | None = None
        if objective.uses_self_teacher:
            average = load_student(student, layout, dtype, train_merger=vision.train_merger)
            self.average = WeightAverage(average, objective.self_distillation.rate)
        self.phases = PhaseTimers()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, *minibatches: Batch, logged_sample_ids: Container[int] = ()) -> StepReport:
        """One update for each minibatch of a step's rollouts; with several, log-probs before the first are the ratios'
        denominators. Numbers are reduced over all ranks; a non-finite gradient changes no parameter anywhere.
        `logged_sample_ids`: indices of the samples whose tokens are reported one by one."""
        batches = [batch_to(batch, self._layout.device) for batch in minibatches]
        if len(batches) > 1:
            with self.phases("old_logprobs"):
                batches = [self._with_logp_old(batch) for batch in batches]
        self.schedule.step(1)
        tallies, grad_norms = [], []
        for batch in batches:
            tallies += self.accumulate_gradients(batch)
            with self.phases("optimizer"):
                grad_norms.append(self._update())
        if self.average is not None:
            self.average.follow(self.chunks)
        report = self._report(batches, tallies, grad_norms, logged_sample_ids) if self._layout.is_last_stage else None
        return self._layout.from_last_stage(report)

    def skip(self, reason: str, remedy: str) -> StepReport:
        """A step with nothing to learn from: no parameter or moment changes, the schedule goes on, and rank 0 says so.
        Raises ValueError after optimizer.max_bad_steps bad steps in a row. All ranks call."""
        if dist.get_rank() == 0:
            print(f"vold: {reason}; this step trains nothing", file=sys.stderr, flush=True)
        self.schedule.step(1)
        self._count_bad_step(reason, remedy)
        return StepReport({"lr": self._lr(), "skipped": 1.0})

    def accumulate_gradients(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Forward and backward of all micro-batches, reduced over all groups into each parameter's `main_grad`.
        Returns a tally of each micro-batch on the last pipeline stage, nothing elsewhere."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        forward = partial(self.phases, "student_forward")
        with self.phases("student_backward", without="student_forward"):  # with communication, and waiting for stages
            return self._run(batch, self._loss, timed=forward)

    def _run(self, batch: Batch, head: Head[ResultT], **options) -> list[ResultT]:
        return run_pipeline(self._chunks, batch.micro_batches, self._layout, head, vision=self._vision, **options)

    def _report(
        self,
        batches: Sequence[Batch],
        tallies: Sequence[dict[str, Tensor]],
        grad_norms: Sequence[float],
        shown: Container[int],
    ) -> StepReport:
        """On the last pipeline stage; a collective over its data-parallel group. Losses and norms are means over the
        updates, the others over all their tokens."""
        group, updates = self._layout.dp_group, len(batches)
        flops = sum(self._useful_flops(batch) for batch in batches)
        metrics = reduce_stats(tallies, group, train_tflop=flops / 1e12)
        metrics |= {name: metrics[name] / updates for name in ("loss", "pg_loss", "kl_loss")}
        skipped = sum(not math.isfinite(norm) for norm in grad_norms)
        metrics |= {"grad_norm": sum(grad_norms) / updates, "lr": self._lr(), "skipped": float(skipped)}
        micro_batches = [micro for batch in batches for micro in batch.micro_batches]
        tokens = token_logps(micro_batches, tallies, shown, group)
        return StepReport(metrics, mean_kl(micro_batches, tallies, group), tokens)

    def _loss(self, batch: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_ND, weight = hidden_TD[batch.source_N], self.chunks[-1].head_weight()
        # The buffer was zeroed before the first forward pass, and the schedule leaves the loss as it is (no loss
        # scale, 0 tokens to divide by): what both losses ask of whoever hands them the buffer.
        head = self._head() | {"weight_main_grad": weight.main_grad}
        terms, numbers = self._objective.policy_terms(batch), self._objective.loss_options()
        if self._importance_cap is not None:
            terms = replace(terms, logp_rollout_N=batch.logp_rollout_N)
            numbers |= {"importance_cap": self._importance_cap}
        out = linear_policy_loss(hidden_ND, weight, batch.target_N, terms, **numbers, **head)
        if batch.hidden_teacher_nE is None:
            return out.loss, micro_batch_stats(
                out, batch, importance_cap=self._importance_cap, kl_clamp=self._objective.kl_clamp
            )
        scored_n = (batch.kl_weight_N != 0).nonzero()[:, 0]
        full = linear_kl(
            hidden_ND[scored_n],
            weight,
            batch.hidden_teacher_nE,
            batch.head_teacher_UE,
            weight_N=(batch.kl_weight_N * self._truncated_ratio(batch, hidden_TD))[scored_n],
            **self._objective.divergence_options(),
            **head,
        )
        return out.loss + full.loss, micro_batch_stats(out, batch, importance_cap=self._importance_cap, full=full)

    @torch.no_grad()
    def _truncated_ratio(self, batch: MicroBatch, hidden_TD: Tensor) -> Tensor:
        """min(pi / pi that sampled, cap) of each token, without gradient; 1 where these weights sampled it."""
        sampled_N, cap = batch.logp_old_N, self._objective.divergence.ratio_cap
        if self._importance_cap is not None:
            sampled_N, cap = batch.logp_rollout_N, self._importance_cap
        if sampled_N is None:
            return torch.ones_like(batch.kl_weight_N)
        return (self._logp(batch, hidden_TD) - sampled_N).exp().clamp(max=cap)

    def _head(self) -> dict:
        """How logits are made of hidden states, for every function of vold_kernels."""
        return {
            "temperature": self._temperature,
            "tp_group": self._layout.tp_group,
            "vocab_size": self.vocab_size,
        }

    def _update(self) -> float:
        """Clip, check, update. Returns the gradient norm before clipping."""
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.clip_grad_norm(self._optimizer.config.clip_grad))
        if math.isfinite(grad_norm):  # the norm is reduced over all ranks, so every rank decides alike
            self._optimizer.step_with_ready_grads()
            self._bad_steps = 0
        else:
            remedy = "lower optimizer.lr, or look at the last rows of samples.jsonl"
            self._count_bad_step(f"gradient norm was {grad_norm}", remedy)
        return grad_norm

    def _count_bad_step(self, reason: str, remedy: str) -> None:
        self._bad_steps += 1
        if self._bad_steps >= self._max_bad_steps:
            raise ValueError(
                f"{reason} for {self._bad_steps} steps in a row (optimizer.max_bad_steps); no parameter was changed by "
                f"them; {remedy}"
            )

    def _useful_flops(self, batch: Batch) -> float:
        """Of this rank's share; one-token fillers have no target and do not count."""
        work = [micro.tokens for micro in batch.micro_batches if micro.sample_B]
        return sum(training_flops(self.chunks[0].arch, tokens) for tokens in work)

    @property
    def replicas(self) -> Replicas:
        """How `pack` divides a step among the data-parallel copies."""
        cost = partial(segment_flops, self.chunks[0].arch)
        return Replicas(self._layout.dp, self._layout.dp_rank, cost)

    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    # -- reading the policy ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _with_logp_old(self, batch: Batch) -> Batch:
        """The batch with logp_old_N filled in on the last pipeline stage, where the loss is."""

        def read(micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
            return hidden_TD, self._logp(micro, hidden_TD)

        found = self._run(batch, read, forward_only=True)
        if not self._layout.is_last_stage:
            return batch
        filled = zip(batch.micro_batches, found, strict=True)
        return Batch(tuple(replace(micro, logp_old_N=logp_N) for micro, logp_N in filled))

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> dict[int, list[float]]:
        """Sample place -> log-probability (nats, temperature 1) of each response token under the current weights, on
        every rank; images allowed. All ranks of one model copy pass the same batch."""
        batch = batch_to(batch, self._layout.device)
        found = self._run(batch, self._read, forward_only=True)
        return self._layout.from_last_stage({place: logps for part in found for place, logps in part.items()})

    def _logp(self, micro: MicroBatch, hidden_TD: Tensor, **head) -> Tensor:
        weight = self.chunks[-1].head_weight()
        return linear_logprob(hidden_TD[micro.source_N], weight, micro.target_N, **self._head() | head)

    def _read(self, micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, dict[int, list[float]]]:
        logp_N = self._logp(micro, hidden_TD, temperature=1.0)
        places = enumerate(micro.sample_B)
        return hidden_TD, {place: logp_N[micro.sequence_N == sequence].tolist() for sequence, place in places}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights by transformers' names, streamed. Those of the vision tower's frozen part are not among
        them."""
        return export_weights(self.chunks)

    # -- for checkpoints -------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> list[LanguageModel]:
        """This rank's part of the student, without Megatron's wrappers: one chunk, or one per virtual stage."""
        return [unwrap(chunk) for chunk in self._chunks]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's trained parameters by Megatron's names, which number the layers of a chunk from 0; with several
        chunks behind `chunk{i}.`. A tied head on a stage of its own is a second parameter, `output_layer.weight`."""
        prefix = "chunk{}." if len(self._chunks) > 1 else ""
        return {
            prefix.format(number) + name: parameter
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }

    @property
    def optimizer(self) -> MegatronOptimizer:
        return self._optimizer


def load_student(
    checkpoint: Path, layout: Layout, dtype: torch.dtype, *, train_merger: bool = False
) -> list[LanguageModel]:
    """This rank's part of what is trained of the student, with a checkpoint directory's weights."""
    chunks = build_chunks(Architecture.from_pretrained(checkpoint), layout, dtype, train_merger=train_merger)
    for chunk in chunks:
        load_pretrained(chunk, checkpoint)
    return chunks


def _wrap(chunks: Sequence[LanguageModel]) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk: gradients live in fp32 buffers, `parameter.main_grad`."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=chunks[0].layout.distributed_optimizer
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.train()
    return wrapped
