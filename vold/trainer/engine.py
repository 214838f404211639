"""The only training engine: Megatron-core, from a laptop (tp = pp = 1, gloo) to a cluster.

One step is `Trainer.step`: forward and backward over the micro-batches, one reduction, one update. The loss is the
fused `linear_policy_loss` on the hidden states of the last stage; logits never exist.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from vold.config.schema import OptimizerConfig
from vold.data.pack import Replicas
from vold.models.architecture import Architecture
from vold.models.language_model import LanguageModel, build_chunks, unwrap
from vold.models.vision import FrozenVisionTower
from vold.models.weights import export_weights, load_pretrained
from vold.parallel.launch import Layout
from vold.records import Batch, MicroBatch, StepReport
from vold.trainer.device import batch_to
from vold.trainer.flops import segment_flops, training_flops
from vold.trainer.optimizer import build_optimizer, build_schedule
from vold.trainer.phases import Phases
from vold.trainer.pipeline import run_pipeline
from vold.trainer.tally import mean_kl, reduce_tallies, tally, token_logps
from vold_kernels.linear_logprob import linear_logprob
from vold_kernels.linear_policy_loss import PolicyTerms, linear_policy_loss


class Trainer:
    """The student with its optimizer. `vocab_size`: ids both models really have; rows beyond are -inf.
    `importance_cap`: rollouts may be of older weights, and each token's loss is weighted by
    min(exp(logp - logp_rollout), importance_cap); None: they are of these weights."""

    def __init__(
        self,
        student: Path,
        layout: Layout,
        optimizer: OptimizerConfig,
        *,
        steps: int,
        dtype: torch.dtype,
        vocab_size: int,
        clip: tuple[float, float] = (0.2, 0.3),
        temperature: float = 1.0,
        importance_cap: float | None = None,
    ):
        self._importance_cap = importance_cap
        self._layout, self._clip, self._temperature, self._vocab_size = layout, clip, temperature, vocab_size
        self._student, self._dtype = student, dtype
        self._chunks = _wrap(load_student(student, layout, dtype))
        self._optimizer = build_optimizer(self._chunks, optimizer, dtype)
        self.schedule = build_schedule(self._optimizer, optimizer, steps)
        self._max_bad_steps, self._bad_steps = optimizer.max_bad_steps, 0
        self._vision: FrozenVisionTower | None = None
        self.phases = Phases()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, *, shown: Container[int] = ()) -> StepReport:
        """One update. The numbers are reduced over all ranks; a non-finite gradient changes no parameter anywhere.
        `shown`: places of the samples whose tokens are reported one by one."""
        batch = batch_to(batch, self._layout.device)
        tallies = self.accumulate_gradients(batch)
        with self.phases("optimizer"):
            grad_norm = self._update()
        report = self._report(batch, tallies, grad_norm, shown) if self._layout.is_last_stage else None
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
            return run_pipeline(self._chunks, batch.micro_batches, self._layout, self._loss, timed=forward)

    def _report(
        self, batch: Batch, tallies: Sequence[dict[str, Tensor]], grad_norm: float, shown: Container[int]
    ) -> StepReport:
        """On the last pipeline stage; a collective over its data-parallel group."""
        group = self._layout.dp_group
        metrics = reduce_tallies(tallies, group, train_tflop=self._useful_flops(batch) / 1e12)
        metrics |= {"grad_norm": grad_norm, "lr": self._lr(), "skipped": float(not math.isfinite(grad_norm))}
        tokens = token_logps(batch.micro_batches, tallies, shown, group)
        return StepReport(metrics, mean_kl(batch.micro_batches, tallies, group), tokens)

    def _loss(self, batch: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weight, off_policy = self.chunks[-1].head_weight(), self._importance_cap is not None
        out = linear_policy_loss(
            hidden_TD[batch.source_N],
            weight,
            batch.target_N,
            PolicyTerms(
                batch.logp_old_N,
                batch.logp_teacher_N,
                batch.advantage_N,
                batch.pg_weight_N,
                batch.kl_weight_N,
                batch.logp_rollout_N if off_policy else None,
            ),
            eps_low=self._clip[0],
            eps_high=self._clip[1],
            importance_cap=self._importance_cap or 1.0,  # without logp_rollout_N it is not read
            temperature=self._temperature,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
            # The buffer was zeroed before the first forward pass, and the schedule leaves the loss as it is (no loss
            # scale, 0 tokens to divide by): what this call asks of whoever hands it the buffer.
            weight_main_grad=weight.main_grad,
        )
        return out.loss, tally(out, batch, self._importance_cap)

    def _update(self) -> float:
        """Clip, check, advance the schedule, update. Returns the gradient norm before clipping."""
        self.schedule.step(1)
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
    def logprobs(self, batch: Batch) -> dict[int, list[float]]:
        """Sample place -> log-probability (nats, temperature 1) of each response token under the current weights, on
        every rank; images allowed. All ranks of one model copy pass the same batch."""
        batch = batch_to(batch, self._layout.device)
        sees = any(micro.tokens.pixel_values is not None for micro in batch.micro_batches)
        vision = self._tower() if sees and self._layout.is_first_stage else None
        found = run_pipeline(
            self._chunks, batch.micro_batches, self._layout, self._read, forward_only=True, vision=vision
        )
        return self._layout.from_last_stage({place: logps for part in found for place, logps in part.items()})

    def _read(self, micro: MicroBatch, hidden_TD: Tensor) -> tuple[Tensor, dict[int, list[float]]]:
        logp_N = linear_logprob(
            hidden_TD[micro.source_N],
            self.chunks[-1].head_weight(),
            micro.target_N,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )
        places = enumerate(micro.sample_B)
        return hidden_TD, {place: logp_N[micro.sequence_N == sequence].tolist() for sequence, place in places}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights by transformers' names, streamed. The frozen vision tower is not among them."""
        return export_weights(self.chunks)

    def _tower(self) -> FrozenVisionTower:
        if self._vision is None:
            self._vision = FrozenVisionTower.from_pretrained(self._student, self._dtype, device=self._layout.device)
        return self._vision

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


def load_student(checkpoint: Path, layout: Layout, dtype: torch.dtype) -> list[LanguageModel]:
    """This rank's part of the student's language model with a checkpoint directory's weights."""
    chunks = build_chunks(Architecture.from_pretrained(checkpoint), layout, dtype)
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
