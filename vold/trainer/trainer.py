"""The trainer of both stages, on Megatron-core, from a laptop (tp = pp = 1, gloo) to a cluster.

One step is `Trainer.step`: forward and backward over the micro-batches, one reduction, one update. The loss is the
fused `linear_policy_loss` on the hidden states of the last stage; logits never exist.

T packed tokens of a micro-batch, N of them with a target, n of these with a KL term, D hidden width of the student,
E of the teacher, U head rows of a tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from vold.config.schema import AdapterConfig, OptimizerConfig, VisionConfig
from vold.data.packing import Replicas
from vold.models.architecture import Architecture
from vold.models.flops import idle_head_flops, segment_flops, training_flops
from vold.models.language_model import LanguageModel, open_vision_tower, unwrap
from vold.models.router_replay import RouterReplay
from vold.models.student import backward_of, check_rates, load_chunks
from vold.models.weights import export_adapters, export_weights
from vold.objectives import Objective
from vold.parallel.launch import Layout
from vold.run.timers import PhaseTimers
from vold.trainer import bad_steps
from vold.trainer.metrics import (
    MicroBatchStats,
    by_sample,
    mean_kl,
    micro_batch_stats,
    reduce_stats,
    token_logps,
    whole_sequences,
)
from vold.trainer.optimizer import build_optimizer, build_schedule, clip_gradient, gradient_norm_squared
from vold.trainer.own_targets import among_all, of_all_ranks
from vold.trainer.pipeline import Head, HeadOutput, ResultT, head_output, run_pipeline
from vold.trainer.weight_average import WeightAverage
from vold.trainer.weight_gradients import add_to_main_grad
from vold.types import Batch, DistributionTerm, MicroBatch, StepReport
from vold_kernels import KLLoss, linear_kl, linear_logprob, linear_policy_loss, linear_topk_kl


class _Update(NamedTuple):
    """grad_norm: before clipping; made: the parameters were updated."""

    grad_norm: float
    made: bool


class Trainer:
    """The student with its optimizer.

    vocab_size: ids that both models really have; logits of head rows beyond are -inf. objective: its ratio, bounds and
    divergence are read by the loss; advantages and normalisers are in the batches' weights already. importance_cap:
    rollouts may come from older weights, and each token's terms get truncated importance weights (see
    linear_policy_loss); None: they come from the current weights. terms: names of the micro-batches' further KL terms,
    for their metrics (`reference` is k3's too). router_replay: see RolloutConfig. average: the student's moving
    average, where the objective distils from it.
    """

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
        adapter: AdapterConfig | None = None,
        train: Sequence[str] | None = None,
        terms: Sequence[str] = (),
        router_replay: str | None = None,
    ):
        self.vocab_size, self._terms = vocab_size, tuple(terms)
        self._layout, self._objective = layout, objective
        self._temperature, self._importance_cap = temperature, importance_cap
        trained = {"train": train, "train_merger": vision.train_merger, "adapter": adapter}
        load = partial(load_chunks, student, layout, dtype, **trained)
        arch = Architecture.from_pretrained(student)
        check_rates(arch, optimizer.lr_groups, train, adapter, vision.train_merger)
        self._chunks = _wrap(load())
        self._backward = backward_of(arch, **trained)
        for chunk in self.chunks if arch.mixture is not None else ():
            chunk.replay = RouterReplay(router_replay, layout.device)
        self.vision = open_vision_tower(self.chunks, student, dtype, vision.patches_per_pass)
        self.optimizer = build_optimizer(self._chunks, optimizer, dtype)
        self.schedule = build_schedule(self.optimizer, optimizer, steps)
        self._bad_steps = bad_steps.BadSteps(optimizer.max_bad_steps)
        self.average: WeightAverage | None = None
        if objective.uses_self_teacher:
            assert objective.self_distillation is not None
            self.average = WeightAverage(load(), objective.self_distillation.rate, self.chunks)
        self.phases = PhaseTimers()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, *minibatches: Batch, logged_sample_ids: Container[int] = ()) -> StepReport:
        """One update for each minibatch of a step's rollouts; with several, log-probs before the first are the ratios'
        denominators. Metrics are reduced over all ranks; an update that is not finite, or has no gradient, changes no
        parameter anywhere (see bad_steps). logged_sample_ids: indices of the samples whose log-probs are reported token
        by token. Raises ValueError for an id that is not the vocabulary's."""
        for batch in minibatches:
            bad_steps.check_ids(batch, self.vocab_size)
        batches = [batch.to(self._layout.device) for batch in minibatches]
        for replay in self._replays:
            replay.begin_step()
        if len(batches) > 1:
            with self.phases("old_logprobs"):
                batches = [self._with_logp_old(number, batch) for number, batch in enumerate(batches)]
        self.schedule.step(1)
        stats: list[MicroBatchStats] = []
        updates: list[_Update] = []
        for number, batch in enumerate(batches):
            self._begin_update(number, is_only=len(batches) == 1)
            batch_stats = self.accumulate_gradients(batch)
            with self.phases("optimizer"):
                updates.append(self._update(batch, batch_stats))
            stats += batch_stats
        if self.average is not None and any(update.made for update in updates):
            self.average.update(self.chunks)
        report = self._report(batches, stats, updates, logged_sample_ids) if self._layout.is_last_stage else None
        report = self._layout.from_last_stage(report)
        return replace(report, metrics=report.metrics | self._router_mismatch()) if self._replays else report

    @property
    def _replays(self) -> list[RouterReplay]:
        return [chunk.replay for chunk in self.chunks if chunk.replay is not None]

    def _router_mismatch(self) -> dict[str, float]:
        """The share of token-layer pairs whose experts the sampler chose otherwise, over all ranks; a collective."""
        differing_2 = torch.stack([replay.differing_2 for replay in self._replays]).sum(0)
        dist.all_reduce(differing_2)
        differing, compared = differing_2.tolist()
        for replay in self._replays:
            replay.end_step()
        return {"router_mismatch": differing / compared} if compared else {}

    def _begin_update(self, number: int, *, is_only: bool) -> None:
        """Adapters draw this update's dropout: of the step's minibatch `number`, on this replica."""
        for replay in self._replays:
            replay.update(number, counts=is_only)
        for chunk in self.chunks:
            if chunk.dropout is not None:
                chunk.dropout.begin_update(int(self.schedule.num_steps), number, self._layout.dp_rank)

    def accumulate_gradients(self, batch: Batch) -> list[MicroBatchStats]:
        """Forward and backward of all micro-batches, reduced over all groups into each parameter's `main_grad`.
        Returns the stats of each micro-batch on the last pipeline stage, nothing elsewhere: of this rank's targets
        (own_targets); log-probs of others are 0."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.phases("student_backward", without="student_forward"):  # includes communication and pipeline bubbles
            stats = run_pipeline(
                self._chunks,
                batch.micro_batches,
                self._layout,
                self._loss,
                vision=self.vision,
                timer=partial(self.phases, "student_forward"),
            )
        pairs = zip(batch.micro_batches, stats, strict=False)  # none off the last stage
        return [replace(s, logp_N=among_all(micro, s.logp_N, self._layout)) for micro, s in pairs]

    def _loss(self, micro: MicroBatch, hidden_TD: Tensor) -> HeadOutput[MicroBatchStats]:
        """The loss of one micro-batch and its stats: the policy gradient with its k2 KL, or with a full-vocabulary
        divergence where the micro-batch has the teacher's hidden states."""
        with self.phases("student_forward"):
            student, hidden_ND = self.chunks[-1], hidden_TD[micro.source_N]
            terms = self._objective.policy_terms(micro)
            options = {**self._objective.loss_options(), **self._loss_options()}
            if self._layout.cp > 1:
                options["sequence_group"] = self._layout.cp_group
            if self._importance_cap is not None:
                terms = replace(terms, logp_rollout_N=micro.logp_rollout_N)
                options["importance_cap"] = self._importance_cap
            policy = linear_policy_loss(hidden_ND, student.head_weight(), micro.target_N, terms, **options)
            own = self._own_term(micro)
            divergence = None if own is None else self._divergence(own, micro, hidden_ND)
            further = [self._divergence(term, micro, hidden_ND) for term in micro.further_terms]
            loss = policy.loss if divergence is None else policy.loss + divergence.loss
            loss = sum((term.loss for term in further), loss)
            clamps = {"kl_clamp": self._objective.kl_clamp, "importance_cap": self._importance_cap}
            stats = micro_batch_stats(policy, micro, divergence=divergence, further=further, **clamps)
            return head_output(loss, stats)

    def _own_term(self, micro: MicroBatch) -> DistributionTerm | None:
        """The objective's KL term, where it is one of whole distributions."""
        divergence = self._objective.divergence
        return None if divergence is None else divergence.term("teacher", micro)

    def _divergence(self, term: DistributionTerm, micro: MicroBatch, hidden_ND: Tensor) -> KLLoss:
        """Of the n tokens with a weight in the term."""
        scored_n = (term.weight_N != 0).nonzero()[:, 0]
        ratio_N = self._truncated_ratio(micro, hidden_ND.detach(), term.ratio_cap)
        return (linear_topk_kl if term.is_top else linear_kl)(
            hidden_ND[scored_n],
            self.chunks[-1].head_weight(),
            *term.rows,
            weight_N=(term.weight_N * ratio_N)[scored_n],
            **term.options,
            **self._loss_options(),
        )

    @torch.no_grad()
    def _truncated_ratio(self, micro: MicroBatch, hidden_ND: Tensor, cap: float) -> Tensor:
        """[N] min(pi / pi_rollout, cap), without gradient; 1 where these weights sampled the token."""
        if self._importance_cap is not None:
            logp_sampled_N, cap = micro.logp_rollout_N, self._importance_cap
        else:
            logp_sampled_N = micro.logp_old_N
        if logp_sampled_N is None:
            return torch.ones_like(micro.kl_weight_N)
        return (self._logp(micro, hidden_ND) - logp_sampled_N).exp().clamp(max=cap)

    def _head_options(self) -> dict[str, Any]:
        """Keywords that every function of vold_kernels takes to compute logits from hidden states."""
        return {
            "temperature": self._temperature,
            "tp_group": self._layout.tp_group,
            "vocab_size": self.vocab_size,
        }

    def _loss_options(self) -> dict[str, Any]:
        """The losses add the head's gradient to `main_grad` directly: accumulate_gradients zeroed it, and Megatron's
        schedule does not scale the loss (see head_output)."""
        return self._head_options() | {"weight_main_grad": self.chunks[-1].head_main_grad()}

    def _update(self, batch: Batch, stats: Sequence[MicroBatchStats]) -> _Update:
        """Clip the gradient and update, unless the loss or the gradient is not finite, or the gradient exactly zero.
        Every rank decides alike: both are reduced over all, and read together, where the host waits for the update."""
        self.optimizer.prepare_grads()
        flag = bad_steps.nonfinite_flag(stats, self._layout.device)
        squared, is_nonfinite = torch.stack([gradient_norm_squared(self.optimizer), flag]).tolist()
        grad_norm = squared**0.5
        nonfinite = bad_steps.nonfinite_reason(batch, stats) if is_nonfinite else None
        norm_reason = None if math.isfinite(grad_norm) else f"gradient norm was {grad_norm}"
        if reason := nonfinite or norm_reason:
            bad_steps.warn(reason)
            self._bad_steps.add(norm_reason or reason)
        elif grad_norm == 0.0:
            bad_steps.warn("no response has a gradient")
        else:
            clip_gradient(self.optimizer, grad_norm)
            self.optimizer.step_with_ready_grads()
            self._bad_steps.reset()
            return _Update(grad_norm, made=True)
        return _Update(grad_norm, made=False)

    def skip(self, reason: str, remedy: str) -> StepReport:
        """Record a step without samples: no parameter or moment changes, the schedule advances, rank 0 logs `reason`.
        Raises Diverged, with `remedy`, after optimizer.max_bad_steps bad steps in a row. All ranks call."""
        bad_steps.warn(reason)
        self.schedule.step(1)
        self._bad_steps.add(reason, remedy)
        return StepReport({"lr": self._lr(), "skipped": 1.0})

    def _report(
        self,
        batches: Sequence[Batch],
        stats: Sequence[MicroBatchStats],
        updates: Sequence[_Update],
        logged_sample_ids: Container[int],
    ) -> StepReport:
        """The step's report, on the last pipeline stage; a collective over its ranks of all replicas. Losses
        and norms are means over the updates, the other metrics over all their tokens."""
        group, layout = self._layout.dp_group, self._layout
        flops = sum(self._useful_flops(batch) for batch in batches) / layout.cp
        stats = whole_sequences(stats, layout)
        metrics, kl_BB = reduce_stats(stats, layout.replica_group, train_tflop=flops / 1e12, terms=self._terms)
        losses = ["loss", "pg_loss", "kl_loss", *(f"{term}_loss" for term in self._terms)]
        metrics |= {name: metrics[name] / len(updates) for name in losses if name in metrics}
        metrics["grad_norm"] = sum(update.grad_norm for update in updates) / len(updates)
        metrics |= {"lr": self._lr(), "skipped": float(sum(not update.made for update in updates))}
        micro_batches = [micro for batch in batches for micro in batch.micro_batches]
        logps = token_logps(micro_batches, stats, logged_sample_ids, group)
        return StepReport(metrics, mean_kl(micro_batches, kl_BB, group), logps)

    def _useful_flops(self, batch: Batch) -> float:
        """FLOPs of this model copy's share of a step; one-token fillers have no target and do not count."""
        arch, counted = self.chunks[0].arch, [micro for micro in batch.micro_batches if micro.sample_B]
        without_target = sum(micro.tokens.input_ids_T.numel() - micro.target_N.numel() for micro in counted)
        flops = sum(training_flops(arch, micro.tokens, self._backward) for micro in counted)
        return flops - idle_head_flops(arch, without_target, self._backward)

    @property
    def replicas(self) -> Replicas:
        """The data-parallel copies of the model, among which `pack` divides a step."""
        cost = partial(segment_flops, self.chunks[0].arch)
        return Replicas(self._layout.dp, self._layout.dp_rank, cost)

    def _lr(self) -> float:
        """The rate of what is in no group of optimizer.lr_groups."""
        return float(self.schedule.get_lr({}))

    # -- reading the policy ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _with_logp_old(self, number: int, batch: Batch) -> Batch:
        """The step's minibatch `number` with logp_old_N filled in on the last pipeline stage, where the loss is."""
        for replay in self._replays:
            replay.before_update(number)

        def head(micro: MicroBatch, hidden_TD: Tensor) -> HeadOutput[Tensor]:
            return head_output(hidden_TD, self._logp(micro, hidden_TD[micro.source_N]))

        logps = self._run_forward(batch, head)
        if not self._layout.is_last_stage:
            return batch
        pairs = zip(batch.micro_batches, logps, strict=True)
        return Batch(
            tuple(replace(micro, logp_old_N=among_all(micro, logp_n, self._layout)) for micro, logp_n in pairs)
        )

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> dict[int, list[float]]:
        """Sample index -> log-probability (nats, temperature 1) of each response token under the current weights, on
        every rank; images allowed. All ranks of one model copy pass the same batch."""

        def head(micro: MicroBatch, hidden_TD: Tensor) -> HeadOutput[Tensor]:
            return head_output(hidden_TD, self._logp(micro, hidden_TD[micro.source_N], temperature=1.0))

        batch = batch.to(self._layout.device)
        found: dict[int, list[float]] = {}
        for micro, logp_n in zip(batch.micro_batches, self._run_forward(batch, head), strict=False):
            logps = by_sample(micro, of_all_ranks(micro, logp_n, self._layout).cpu())
            found |= {sample: logp_L.tolist() for sample, logp_L in logps.items()}
        return self._layout.from_last_stage(found)

    def _run_forward(self, batch: Batch, head: Head[ResultT]) -> list[ResultT]:
        micro_batches, layout = batch.micro_batches, self._layout
        return run_pipeline(self._chunks, micro_batches, layout, head, vision=self.vision, forward_only=True)

    def _logp(self, micro: MicroBatch, hidden_ND: Tensor, **changes) -> Tensor:
        weight_UD, options = self.chunks[-1].head_weight(), self._head_options() | changes
        return cast(Tensor, linear_logprob(hidden_ND, weight_UD, micro.target_N, **options))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by transformers' names, streamed, with adapters merged; a frozen vision tower's are not among
        them."""
        return export_weights(self.chunks)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, by peft's names, streamed."""
        return export_adapters(self.chunks)

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
            if parameter.requires_grad
        }


def _wrap(chunks: Sequence[LanguageModel]) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk: gradients live in fp32 buffers, `parameter.main_grad`."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=chunks[0].layout.distributed_optimizer
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    for chunk in wrapped:
        if unwrap(chunk).layout.device.type == "cuda":
            add_to_main_grad(chunk)
        chunk.config.finalize_model_grads_func = _finalize_gradients
        chunk.train()
    return wrapped


def _finalize_gradients(chunks, _tokens, **options) -> None:
    """Megatron's reduction over all groups without its division by the number of tokens, which is in our weights: it
    would broadcast that number, and the host would wait to see that it is 0."""
    finalize_model_grads(chunks, None, **options)
