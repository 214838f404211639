"""Micro-batches through the pipeline: Megatron's schedules (none, 1F1B, interleaved) behind one function.

T packed tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from vold.data.packing import filler
from vold.models.language_model import hidden_states
from vold.models.vision import FrozenVisionTower
from vold.parallel.launch import Layout
from vold.trainer.device import micro_batch_to
from vold.types import MicroBatch

ResultT = TypeVar("ResultT")
Head = Callable[[MicroBatch, Tensor], tuple[Tensor, ResultT]]
"""(micro-batch, hidden_TD) -> (loss, or any tensor when only forward runs; result). Called on the last stage alone."""


def run_pipeline(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    layout: Layout,
    head: Head[ResultT],
    *,
    forward_only: bool = False,
    vision: FrozenVisionTower | None = None,
    timed: Callable[[], AbstractContextManager] = nullcontext,
) -> list[ResultT]:
    """`head`'s result of each micro-batch, in order; an empty list off the last stage.

    All ranks of one model copy pass the same micro-batches. `vision` is needed where they hold pictures and a chunk
    takes in what is seen: each is looked at once, before the first micro-batch. `timed` is entered around every
    forward pass. Without `forward_only`, gradients are reduced over all groups when it returns.
    """
    if not micro_batches:
        return []
    features = None
    if vision is not None:
        with timed():
            features = vision.features(picture for micro in micro_batches for picture in micro.tokens.pictures)
    fed = [*micro_batches, *_fillers(len(micro_batches), layout)]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head, features, timed),
        data_iterator=[iter(fed) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(fed),
        **_neighbours(chunks[0], layout),
        seq_length=1,  # unused: every micro-batch has its own length
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results[: len(micro_batches)]


class _OneDirectionAtATime(P2PCommunicator):
    """Forward messages, then backward ones, for the interleaved schedule, where Megatron posts both at once. That fails
    with micro-batches of different length, whose shapes travel ahead: a rank waits for the shape of a gradient before
    it has sent the activation that the gradient depends on (4 stages, 4 micro-batches: a deadlock). And with two
    stages, the next rank being the previous one too, activation and gradient swap places."""

    def _communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **rest):
        towards_next = dict(tensor_send_next=tensor_send_next, recv_prev=recv_prev)
        towards_prev = dict(tensor_send_prev=tensor_send_prev, recv_next=recv_next)
        nothing = dict(tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=False)
        received_prev, _, _ = super()._communicate(**nothing | towards_next, **rest)
        _, received_next, _ = super()._communicate(**nothing | towards_prev, **rest)
        return received_prev, received_next, None


def _neighbours(chunk: nn.Module, layout: Layout) -> dict:
    """What replaces Megatron's own communication between stages, where that is needed."""
    if layout.vpp is None:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {"p2p_communicator": _OneDirectionAtATime(layout.pp_group, chunk.config), "pg_collection": groups}


def _fillers(count: int, layout: Layout) -> list[MicroBatch]:
    """The interleaved schedule takes a multiple of pp micro-batches; one token without a target costs next to none."""
    missing = -count % layout.pp if layout.vpp else 0
    return [micro_batch_to(filler(), layout.device)] * missing


def _forward_step(head: Head, features, timed, batches: Iterator[MicroBatch], chunk: nn.Module):
    batch = next(batches)
    with timed():
        return hidden_states(chunk, batch.tokens, features), partial(_head_step, head, timed, batch)


def _head_step(head: Head, timed, batch: MicroBatch, hidden_TD: Tensor):
    """Megatron divides gradients by the token count that a loss returns; ours is inside the weights. Returning 0
    tokens is its "do not divide". (calculate_per_token_loss=True keeps it from dividing by the micro-batch count and
    makes data parallelism sum, not average.)"""
    with timed():
        loss, result = head(batch, hidden_TD)
    return loss, torch.zeros((), dtype=torch.int, device=hidden_TD.device), result
