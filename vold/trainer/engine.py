"""The only training engine: Megatron-core, from a laptop (tp = pp = 1, gloo) to a cluster.

One step is `Trainer.step`: forward and backward over the micro-batches, one reduction, one update. The loss is the
fused `linear_policy_loss` on the hidden states of the last stage; logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from vold.config.schema import OptimizerConfig
from vold.models.architecture import Architecture
from vold.models.language_model import LanguageModel, build_language_model, hidden_states, unwrap
from vold.models.vision import FrozenVisionTower
from vold.models.weights import export_weights, load_pretrained
from vold.parallel.launch import Layout
from vold.records import Batch, MicroBatch, StepReport
from vold.trainer.device import batch_to
from vold.trainer.flops import training_flops
from vold.trainer.optimizer import build_optimizer, build_schedule
from vold.trainer.tally import mean_kl, reduce_tallies, tally
from vold_kernels.linear_logprob import linear_logprob
from vold_kernels.linear_policy_loss import PolicyTerms, linear_policy_loss


class Trainer:
    """The student with its optimizer. `vocab_size`: ids both models really have; rows beyond are -inf."""

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
    ):
        self._layout, self._clip, self._temperature, self._vocab_size = layout, clip, temperature, vocab_size
        self._student, self._dtype = student, dtype
        self._model = self._wrap(load_student(student, layout, dtype))
        self._optimizer = build_optimizer([self._model], optimizer, dtype)
        self.schedule = build_schedule(self._optimizer, optimizer, steps)
        self._max_bad_steps, self._bad_steps = optimizer.max_bad_steps, 0
        self._vision: FrozenVisionTower | None = None

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepReport:
        """One update. The numbers are reduced over all ranks; a non-finite gradient changes no parameter anywhere."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        batch = batch_to(batch, self._layout.device)
        tallies = self._forward_backward(batch)
        grad_norm = self._update()
        metrics = reduce_tallies(tallies, self._layout.dp_group, train_tflop=self._useful_flops(batch) / 1e12)
        metrics |= {"grad_norm": grad_norm, "lr": self._lr(), "skipped": float(not math.isfinite(grad_norm))}
        return StepReport(metrics, mean_kl(batch.micro_batches, tallies))

    def _forward_backward(self, batch: Batch) -> list[dict[str, Tensor]]:
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(batch.micro_batches),
            model=self._model,
            num_microbatches=len(batch.micro_batches),
            seq_length=1,  # unused: every micro-batch has its own length
            micro_batch_size=1,
            forward_only=False,
        )

    def _forward(self, batches: Iterator[MicroBatch], model: DistributedDataParallel):
        batch = next(batches)
        return hidden_states(model, batch.tokens), partial(self._loss, batch)

    def _loss(self, batch: MicroBatch, hidden_TD: Tensor):
        out = linear_policy_loss(
            hidden_TD[batch.source_N],
            unwrap(self._model).head_weight(),
            batch.target_N,
            PolicyTerms(
                batch.logp_old_N, batch.logp_teacher_N, batch.advantage_N, batch.pg_weight_N, batch.kl_weight_N
            ),
            eps_low=self._clip[0],
            eps_high=self._clip[1],
            temperature=self._temperature,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )
        # Megatron divides gradients by the token count a loss returns; ours is inside the weights. Returning 0 tokens
        # is its "do not divide". (calculate_per_token_loss=True keeps it from dividing by the micro-batch count and
        # makes data parallelism sum, not average.)
        no_rescaling = torch.zeros((), dtype=torch.int, device=hidden_TD.device)
        return out.loss, no_rescaling, tally(out, batch)

    def _update(self) -> float:
        """Clip, check, advance the schedule, update. Returns the gradient norm before clipping."""
        self.schedule.step(1)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.clip_grad_norm(self._optimizer.config.clip_grad))
        if math.isfinite(grad_norm):  # the norm is reduced over all ranks, so every rank decides alike
            self._optimizer.step_with_ready_grads()
            self._bad_steps = 0
        else:
            self._bad_steps += 1
        if self._bad_steps >= self._max_bad_steps:
            raise ValueError(
                f"gradient norm was {grad_norm} for {self._bad_steps} steps in a row (optimizer.max_bad_steps); "
                "no parameter was changed by them; lower optimizer.lr, or look at the last rows of samples.jsonl"
            )
        return grad_norm

    def _useful_flops(self, batch: Batch) -> float:
        """Of this rank's share; one-token fillers have no target and do not count."""
        work = [micro.tokens.cu_seqlens for micro in batch.micro_batches if micro.sample_B]
        return sum(training_flops(unwrap(self._model).arch, cu_seqlens) for cu_seqlens in work)

    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    # -- reading the policy ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> dict[int, list[float]]:
        """Sample place -> log-probability (nats, temperature 1) of each response token under the current weights;
        images allowed."""
        found: dict[int, list[float]] = {}
        for micro in batch_to(batch, self._layout.device).micro_batches:
            logp_N = self._micro_logprobs(micro)
            for sequence, place in enumerate(micro.sample_B):
                found[place] = logp_N[micro.sequence_N == sequence].tolist()
        return found

    def _micro_logprobs(self, micro: MicroBatch) -> Tensor:
        vision = self._tower() if micro.tokens.pixel_values is not None else None
        hidden_TD = hidden_states(self._model, micro.tokens, vision)
        return linear_logprob(
            hidden_TD[micro.source_N],
            unwrap(self._model).head_weight(),
            micro.target_N,
            tp_group=self._layout.tp_group,
            vocab_size=self._vocab_size,
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights by transformers' names, streamed. The frozen vision tower is not among them."""
        return export_weights(unwrap(self._model))

    def _tower(self) -> FrozenVisionTower:
        if self._vision is None:
            self._vision = FrozenVisionTower.from_pretrained(self._student, self._dtype, device=self._layout.device)
        return self._vision

    # -- for checkpoints -------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's trained parameters by Megatron's names."""
        return dict(unwrap(self._model).named_parameters())

    @property
    def optimizer(self):
        return self._optimizer

    def _wrap(self, model: LanguageModel) -> DistributedDataParallel:
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        wrapped = DistributedDataParallel(model.config, settings, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        wrapped.train()
        return wrapped


def load_student(checkpoint: Path, layout: Layout, dtype: torch.dtype) -> LanguageModel:
    """The student's language model with a checkpoint directory's weights."""
    model = build_language_model(Architecture.from_pretrained(checkpoint), layout, dtype)
    load_pretrained(model, checkpoint)
    return model
