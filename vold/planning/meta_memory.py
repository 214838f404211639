"""Memory of a training step on one rank, counted without a GPU.

Parameters are counted from their shapes. Activations are counted over a forward and backward pass on the meta device,
where tensors have shapes and no memory.

T packed tokens, D hidden width, N tokens with a loss, U head rows of a rank, K packed keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from vold.models.language_model import LanguageModel, hidden_states
from vold.models.layer_ops import simulate_device
from vold.parallel import cpu
from vold.parallel.launch import Layout
from vold.trainer.offload import ActivationOffload
from vold.types import PackedTokens
from vold_kernels.chunks import default_budget
from vold_kernels.lanes import CudaLanes
from vold_kernels.rows_torch import BLOCK
from vold_kernels.waves import HeadShape, shared_bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created inside the block that are alive: `now`, and their maximum, `peak`.

    On any device, meta included, or on devices of type `device` alone. What an operator allocates and frees within one
    call is not counted.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves((args, kwargs)), tree_leaves(out))
        return out

    def count(self, inputs: Sequence, outputs: Sequence) -> None:
        """Count the tensors among `outputs` that no `inputs` have the memory of."""
        taken = {storage._cdata for storage in self._storages(inputs)}
        for storage in self._storages(outputs):
            key, size = storage._cdata, storage.nbytes()
            if key not in taken and key not in self._counted:  # else a view, or written in place
                self._counted.add(key)
                self.now += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size

    def _storages(self, leaves: Sequence) -> list[torch.UntypedStorage]:
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        return [x.untyped_storage() for x in tensors if self._device in (None, x.device.type)]


@dataclass(frozen=True)
class MicroBatchBytes:
    """Bytes that one micro-batch adds in one model chunk: `kept` between forward and backward, `peak` over both passes
    (over the forward pass alone where nothing is trained), `host` in CPU memory."""

    kept: int
    peak: int
    host: int = 0


def run_micro_batch(chunk: LanguageModel, tokens: PackedTokens, *, device: str, train: bool) -> MicroBatchBytes:
    """Run a micro-batch through a chunk on the meta device, with the kernels of `device` ("cuda" or "cpu").

    chunk: built on meta in a layout of fake_layout. tokens: on meta too, but for the boundaries of the packing. train:
    run the backward pass as well.
    """
    chunk.train(train)
    trained = [parameter for parameter in chunk.parameters() if train and parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    offload = ActivationOffload(chunk)
    moving = offload.forward_pass() if train and chunk.layout.offload_activations else nullcontext()
    with cpu.on_meta(), simulate_device(device), torch.set_grad_enabled(train), LiveBytes() as live:
        if not chunk.pre_process:
            chunk.set_input_tensor(_stage_input(chunk, tokens, train))
        with moving:
            out = hidden_states(chunk, tokens)
        kept = live.now
        if train:
            out.backward(torch.empty_like(out))
        del out
        chunk.set_input_tensor(None)
    for hook in hooks:
        hook.remove()
    return MicroBatchBytes(kept, live.peak, offload.bytes)


def tower_kept_bytes(tower: PreTrainedModel, patches: int, *, recompute: bool) -> int:
    """Bytes that a trained tower on the meta device keeps for its backward pass over `patches` patches of one image:
    what its first block keeps, for each block with a trained weight before or in it; each block's input alone where it
    recomputes. Patches themselves and mergers are left out."""
    config, dtype = tower.config, tower.dtype
    first = next((n for n, block in enumerate(tower.blocks) if any(p.requires_grad for p in block.parameters())), None)
    if any(p.requires_grad for name, p in tower.named_parameters() if name.startswith(("patch_embed", "pos_embed"))):
        first = 0
    if first is None:
        return 0
    blocks, block = len(tower.blocks) - first, tower.blocks[first]
    x = torch.empty(patches, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    if recompute:
        return blocks * x.numel() * dtype.itemsize
    angles = torch.empty(patches, config.hidden_size // config.num_heads, device="meta")
    boundaries = torch.tensor([0, patches], dtype=torch.int32)
    with torch.enable_grad(), LiveBytes() as live:
        out = block(x, cu_seqlens=boundaries, position_embeddings=(angles, angles))
        kept = live.now
    del out
    return blocks * kept


def _drop_gradient(parameter: Tensor) -> None:
    """Free a gradient, as Megatron's data-parallel wrapper does once it is added to the gradient buffer."""
    parameter.grad = None


def _stage_input(chunk: LanguageModel, tokens: PackedTokens, train: bool) -> Tensor:
    """The previous pipeline stage's output: [T, 1, D], or the rank's share of T under context and sequence
    parallelism."""
    ranks = chunk.layout.cp * (chunk.layout.tp if chunk.layout.sp else 1)
    length = -(-tokens.input_ids_T.numel() // ranks)
    dtype = chunk.config.params_dtype
    return torch.empty(length, 1, chunk.arch.hidden, dtype=dtype, device="meta", requires_grad=train)


def packed_on_meta(tokens: int, prompt: int, response: int, responses: int) -> tuple[PackedTokens, int]:
    """(a full micro-batch on the meta device, its N) of T = `tokens`: prompts of `prompt` tokens, each packed once for
    its `responses` of `response` tokens, the last one cut off where the micro-batch ends. See PackedTokens."""
    shapes, first_keys, left, packed_responses, losses = [], [], tokens, 0, 0
    while left > 0:
        response_queries = max(response - 1, 1)  # a response's last token is not an input
        prompt_queries = 0 if packed_responses % responses else prompt
        queries = min(prompt_queries + response_queries, left)
        shapes.append((queries, queries if prompt_queries else prompt + queries))
        first_keys.append(tokens - left if prompt_queries else first_keys[-1])
        losses += max(queries - prompt_queries + 1, 0)  # the prompt's last state predicts the first response token
        left, packed_responses = left - queries, packed_responses + 1
    queries, keys = torch.tensor([(0, 0), *shapes]).cumsum(0).to(torch.int32).T
    rows = torch.zeros(1, dtype=torch.int64, device="meta")
    shared = int(keys[-1]) > tokens
    packed = PackedTokens(
        input_ids_T=rows.expand(tokens).clone(),
        position_ids_3T=rows.expand(3, tokens).clone(),
        cu_seqlens=queries.contiguous(),
        cu_seqlens_k=keys.contiguous(),
        kv_index_K=rows.expand(int(keys[-1])).clone() if shared else None,
        first_keys=tuple(first_keys),
    )
    return packed, min(losses, tokens)


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peak of a step's forward and backward passes on one rank.

    activations: kept for backward, of all micro-batches in flight. working: added on top at the worst moment. host:
    activations that wait in CPU memory.
    """

    activations: int
    working: int
    host: int = 0


def training_peak(
    chunks: Sequence[LanguageModel],
    tokens: PackedTokens,
    losses: int,
    *,
    micro_batches: int,
    device: str,
    two_heads: bool = False,
) -> TrainingPeak:
    """Run a micro-batch through each of this rank's chunks, then add the loss.

    losses: N of this rank. two_heads: the loss compares the student's and the teacher's distributions (linear_kl).
    """
    passes = [run_micro_batch(chunk, tokens, device=device, train=True) for chunk in chunks]
    layout, last = chunks[0].layout, chunks[-1]
    mean = sum(measured.kept for measured in passes) // len(passes)
    others = (_in_flight(layout, micro_batches) - 1) * mean
    moments = [(others + measured.kept, measured.peak - measured.kept) for measured in passes]
    if last.post_process:
        shape = HeadShape(losses, last.arch.hidden, last.head_weight().shape[0])
        head = head_bytes(shape, last.config.params_dtype, device, ranks=layout.tp, two_heads=two_heads)
        moments.append((others + passes[-1].kept, head))
    host = _in_flight(layout, micro_batches) * sum(measured.host for measured in passes) // len(passes)
    return TrainingPeak(*max(moments, key=sum), host)


def _in_flight(layout: Layout, micro_batches: int) -> int:
    """Most chunk passes whose backward has not begun: Megatron's warm-up and one more."""
    if layout.vpp is None:
        return min(layout.pp - layout.pp_rank, micro_batches)
    warm_up = 2 * (layout.pp - layout.pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vpp)


def head_bytes(shape: HeadShape, dtype: torch.dtype, device: str, *, ranks: int = 1, two_heads: bool = False) -> int:
    """Bytes that linear_policy_loss (linear_kl, of two heads of this shape) holds while it runs: chunks of fp32 logits,
    the N hidden states, their fp32 gradients. The head's gradient goes into the gradient buffer.

    On a GPU there are two chunks of one head, or one of both, together of the budget's size (half of it where `ranks`
    > 1 share the head) unless all logits are smaller, or the most tokens of a chunk are reached.
    """
    budget, rows = default_budget(torch.device(device)), (2 if two_heads else 1) * shape.rows
    if device == "cpu":
        in_flight = budget.resident_tokens(rows, 4, shape.tokens)
    else:
        resident = budget.resident_bytes if ranks == 1 else shared_bytes(budget.resident_bytes)
        most = (1 if two_heads else CudaLanes.buffers) * budget.max_tokens
        in_flight = min(shape.tokens, most, resident // (4 * rows))
    total = 4 * in_flight * rows + shape.tokens * shape.hidden * (dtype.itemsize + 4)
    total += in_flight * shape.hidden * dtype.itemsize
    if device == "cpu":  # tiles sized for the cache: one more tile, and six tensors of [chunk, D]
        total += 4 * in_flight * (min(shape.rows, BLOCK) + 6 * shape.hidden)
    return total


def training_state_bytes(
    parameters: int, layout: Layout, dtype: torch.dtype, frozen: int = 0, experts: int = 0
) -> dict[str, float]:
    """Bytes of a rank's weights, and of its trained parameters' fp32 gradients and optimizer: fp32 masters (of a
    bfloat16 model) and Adam's moments, divided over the ranks that hold copies by a distributed optimizer. parameters:
    the trained ones, `experts` of them of a mixture. frozen: those that have a weight alone."""
    kept = own_state(parameters, experts, layout)
    return {
        "weights": (parameters + frozen) * dtype.itemsize,
        "gradients": parameters * 4,
        "optimizer": state_masters(kept, dtype) + kept * 8,
    }


def state_masters(kept: float, dtype: torch.dtype) -> float:
    """Bytes of a rank's fp32 masters of a bfloat16 model. kept: see own_state."""
    return (4 if dtype.itemsize < 4 else 0) * kept


def update_bytes(kept: float, largest_parameter: int, device: str) -> float:
    """Bytes that AdamW adds while it runs: torch takes the square root of all second moments at once on a GPU, of one
    parameter after another on a CPU. kept: see own_state."""
    return 4 * kept if device == "cuda" else 2 * 4 * largest_parameter


def own_state(parameters: int, experts: int, layout: Layout) -> float:
    """Trained parameters whose optimizer state is on this rank: all, or its share of what its data-parallel and
    context-parallel copies (of experts, the copies of these) divide."""
    if not layout.distributed_optimizer:
        return parameters
    return (parameters - experts) / (layout.dp * layout.cp) + experts / layout.experts.dp


def average_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Bytes of a self-teacher: the student's average in its dtype, and the fp32 accumulator of a narrower dtype."""
    return parameters * (dtype.itemsize + (4 if dtype.itemsize < 4 else 0))
