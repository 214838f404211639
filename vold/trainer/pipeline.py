"""Micro-batches through the pipeline: Megatron's schedules (none, 1F1B, interleaved) behind one function.

T packed tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from vold.data.packing import filler
from vold.models.language_model import hidden_states, unwrap
from vold.models.vision import Features, FrozenVisionTower
from vold.parallel.launch import Layout
from vold.trainer.offload import ActivationOffload
from vold.trainer.own_targets import own_targets
from vold.types import MicroBatch

ResultT = TypeVar("ResultT")
HeadOutput = tuple[Tensor, Tensor, ResultT]
Head = Callable[[MicroBatch, Tensor], HeadOutput[ResultT]]
"""(micro-batch, hidden_TD) -> `head_output` of the loss and a result. Called on the last stage alone, under context
parallelism with this rank's targets and tokens (vold.trainer.own_targets)."""


def head_output(loss: Tensor, result: ResultT) -> HeadOutput[ResultT]:
    """A head's return value in the form of Megatron's schedules: (loss, number of tokens, result). Without backward,
    `loss` is any tensor.

    Megatron divides gradients by the number of tokens; ours is inside the weights, and 0 means "do not divide".
    (calculate_per_token_loss=True keeps it from dividing by the micro-batch count and makes data parallelism sum.)
    """
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), result


def run_pipeline(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    layout: Layout,
    head: Head[ResultT],
    *,
    vision: FrozenVisionTower | None = None,
    forward_only: bool = False,
    timer: Callable[[], AbstractContextManager] = nullcontext,
) -> list[ResultT]:
    """Run forward, and backward unless `forward_only`, and return `head`'s result of each micro-batch, in order; an
    empty list off the last stage. Gradients are reduced over all groups when it returns.

    All ranks of one model copy pass the same micro-batches; copies that share experts all call, each with any number.
    vision: needed where they hold pictures and a chunk takes in image features; each picture is encoded once, before
    the first micro-batch. timer: entered around every forward pass up to the head.
    """
    most = _most_micro_batches(len(micro_batches), chunks[0], layout)
    if not most:
        return []
    features = None
    if vision is not None:
        with timer():
            features = vision.features(picture for micro in micro_batches for picture in micro.tokens.pictures)
    padded = [*micro_batches, *_fillers(len(micro_batches), most, layout)]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head, features, timer),
        data_iterator=[iter(padded) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(padded),
        **_communication(chunks[0], layout),
        seq_length=1,  # unused: every micro-batch has its own length
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results[: len(micro_batches)]


def _forward_step(
    head: Head[ResultT],
    features: Features | None,
    timer: Callable[[], AbstractContextManager],
    micro_batches: Iterator[MicroBatch],
    chunk: nn.Module,
) -> tuple[Tensor, Callable[[Tensor], HeadOutput[ResultT]]]:
    micro, layout = next(micro_batches), unwrap(chunk).layout
    with timer(), _saved_activations(chunk):
        hidden_TD = hidden_states(chunk, micro.tokens, features)
    if layout.cp == 1:
        return hidden_TD, partial(head, micro)
    return hidden_TD, lambda hidden_TD: head(own_targets(micro, layout), hidden_TD)


def _saved_activations(chunk: nn.Module) -> AbstractContextManager:
    if unwrap(chunk).layout.offload_activations and torch.is_grad_enabled():
        return ActivationOffload(unwrap(chunk)).forward_pass()
    return nullcontext()


def _most_micro_batches(count: int, chunk: nn.Module, layout: Layout) -> int:
    """The largest number among the ranks that this model's tokens travel to: all of them must run every layer alike."""
    experts = layout.experts
    if unwrap(chunk).arch.mixture is None or experts.ep * experts.etp == 1:
        return count
    largest = torch.tensor(count, device=layout.device)
    for group in (experts.ep_group, experts.etp_group):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def _fillers(count: int, most: int, layout: Layout) -> list[MicroBatch]:
    """Micro-batches of one token without a target, which cost next to nothing: up to `most`, and the interleaved
    schedule takes a multiple of pp."""
    missing = most - count + (-most % layout.pp if layout.vpp else 0)
    return [filler().to(layout.device)] * missing


class _OneDirectionAtATime(P2PCommunicator):
    """Forward messages, then backward ones, for the interleaved schedule, where Megatron posts both at once. That fails
    with micro-batches of different length, whose shapes travel ahead: a rank waits for the shape of a gradient before
    it has sent the activation that the gradient depends on (4 stages, 4 micro-batches: a deadlock). And with two
    stages, the next rank being the previous one too, activation and gradient swap places."""

    def _communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **options):
        communicate: Callable[..., tuple] = super()._communicate  # annotated there with two results; it returns three
        towards_next = dict(tensor_send_next=tensor_send_next, recv_prev=recv_prev)
        towards_prev = dict(tensor_send_prev=tensor_send_prev, recv_next=recv_next)
        nothing = dict(tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=False)
        received_prev, _, _ = communicate(**nothing | towards_next, **options)
        _, received_next, _ = communicate(**nothing | towards_prev, **options)
        return received_prev, received_next, None


def _communication(chunk: nn.Module, layout: Layout) -> dict:
    """Replacements for Megatron's own communication between stages, where they are needed."""
    if layout.vpp is None:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    communicator = _OneDirectionAtATime(layout.pp_group, unwrap(chunk).config)
    return {"p2p_communicator": communicator, "pg_collection": groups}
