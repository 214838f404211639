"""What a step needs of a rank's memory, before there is a rank: parameters are counted, and forward and backward are
run on the meta device, where tensors have shapes and no memory, with every tensor that is alive on the books.

T packed tokens, D hidden width, N tokens with a loss, U head rows of a rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vold.models.language_model import LanguageModel, hidden_states
from vold.models.layer_ops import simulate_device
from vold.parallel import cpu
from vold.parallel.launch import Layout
from vold.types import PackedTokens
from vold_kernels.chunks import default_budget
from vold_kernels.rows_torch import BLOCK


class LiveBytes(TorchDispatchMode):
    """Inside, bytes of tensors that were made and are alive: `now`, and the most there have been, `peak`. On any
    device, meta included; what an operator allocates for itself and frees again is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._counted:  # else a view, or written in place
                self._counted.add(key)
                self.now += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Passed:
    """Bytes of one micro-batch through one chunk: `kept` between forward and backward, `peak` over both passes (over
    the forward pass alone where nothing is trained)."""

    kept: int
    peak: int


def pass_through(chunk: LanguageModel, tokens: PackedTokens, *, device: str, train: bool) -> Passed:
    """Runs a micro-batch through a chunk on the meta device, as it would go on `device` ("cuda", "cpu"). Boundaries of
    the packing lie on the CPU, all other tensors on meta. `chunk`: of a layout that `fake_layout` made."""
    chunk.requires_grad_(train).train(train)
    gone = [p.register_post_accumulate_grad_hook(_into_main_grad) for p in chunk.parameters()] if train else []
    with cpu.on_meta(), simulate_device(device), torch.set_grad_enabled(train), LiveBytes() as live:
        if not chunk.pre_process:
            chunk.set_input_tensor(_received(chunk, tokens, train))
        out = hidden_states(chunk, tokens)
        kept = live.now
        if train:
            out.backward(torch.empty_like(out))
        del out
        chunk.set_input_tensor(None)
    for hook in gone:
        hook.remove()
    return Passed(kept, live.peak)


def _into_main_grad(parameter: Tensor) -> None:
    """What Megatron's data-parallel wrapper does with a gradient once it has added it to the buffer."""
    parameter.grad = None


def _received(chunk: LanguageModel, tokens: PackedTokens, train: bool) -> Tensor:
    """What the stage before sends: [T, 1, D], its share under sequence parallelism."""
    length = tokens.input_ids_T.numel()
    if chunk.layout.sp:
        length = -(-length // chunk.layout.tp)
    dtype = chunk.config.params_dtype
    return torch.empty(length, 1, chunk.arch.hidden, dtype=dtype, device="meta", requires_grad=train)


def packed_on_meta(tokens: int, prompt: int, response: int, responses: int) -> tuple[PackedTokens, int]:
    """A full micro-batch of T tokens, and its N: prompts, each read once for its responses, the last cut off where the
    micro-batch ends. See PackedTokens."""
    shapes, left, siblings, losses = [], tokens, 0, 0
    while left > 0:
        own = max(response - 1, 1)  # a response's last token is not read
        before = 0 if siblings % responses else prompt
        queries = min(before + own, left)
        shapes.append((queries, queries if before else prompt + queries))
        losses += max(queries - before + 1, 0)  # the prompt's last state predicts its first token
        left, siblings = left - queries, siblings + 1
    queries, keys = torch.tensor([(0, 0), *shapes]).cumsum(0).to(torch.int32).T
    rows = torch.zeros(1, dtype=torch.int64, device="meta")
    shared = int(keys[-1]) > tokens
    packed = PackedTokens(
        input_ids_T=rows.expand(tokens).clone(),
        position_ids_3T=rows.expand(3, tokens).clone(),
        cu_seqlens=queries.contiguous(),
        cu_seqlens_k=keys.contiguous(),
        kv_index_K=rows.expand(int(keys[-1])).clone() if shared else None,
    )
    return packed, min(losses, tokens)


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peak of a step's forward and backward passes on one rank. `activations`: kept for backward, of all
    micro-batches that the schedule has in flight; `working`: what comes on top of them at the worst moment."""

    activations: int
    working: int


def training_peak(
    chunks: Sequence[LanguageModel],
    tokens: PackedTokens,
    losses: int,
    *,
    micro_batches: int,
    device: str,
    two_heads: bool = False,
) -> TrainingPeak:
    """Of this rank's chunks, on the meta device. `losses`: N; `two_heads`: a full-vocabulary divergence (linear_kl)."""
    passed = [pass_through(chunk, tokens, device=device, train=True) for chunk in chunks]
    layout, last = chunks[0].layout, chunks[-1]
    mean = sum(one.kept for one in passed) // len(passed)
    others = (_in_flight(layout, micro_batches) - 1) * mean
    moments = [(others + one.kept, one.peak - one.kept) for one in passed]
    if last.post_process:
        rows = last.head_weight().shape[0]
        head = head_bytes(losses, rows, last.arch.hidden, last.config.params_dtype, device, two_heads=two_heads)
        moments.append((others + passed[-1].kept, head))
    return TrainingPeak(*max(moments, key=sum))


def _in_flight(layout: Layout, micro_batches: int) -> int:
    """Forward passes of a chunk whose backward has not begun, at most: Megatron's warm-up and one more."""
    if layout.vpp is None:
        return min(layout.pp - layout.pp_rank, micro_batches)
    warm_up = 2 * (layout.pp - layout.pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vpp)


def head_bytes(losses: int, rows: int, hidden: int, dtype: torch.dtype, device: str, *, two_heads: bool = False) -> int:
    """What linear_policy_loss (or linear_kl, of two heads) holds while it runs: a chunk of fp32 logits, the N hidden
    states, their fp32 gradients. dW goes into the gradient buffer."""
    heads = 2 if two_heads else 1
    chunk = default_budget(torch.device(device)).resident_tokens(heads * rows, 4, losses)
    total = 4 * chunk * heads * rows + losses * hidden * (dtype.itemsize + 4) + chunk * hidden * dtype.itemsize
    if device == "cpu":  # the walk through tiles in cache: one more tile, and half a dozen [C, D]
        total += 4 * chunk * (min(rows, BLOCK) + 6 * hidden)
    return total


def state_bytes(parameters: int, largest: int, layout: Layout, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Weights, fp32 gradients, fp32 masters (of a bfloat16 model) and Adam's moments, the last two divided over the
    data-parallel ranks by a distributed optimizer; and what AdamW makes while it runs: torch takes the square root of
    all second moments at once on a GPU, of one parameter after another on a CPU. `largest`: elements of one."""
    masters = 4 if dtype.itemsize < 4 else 0
    sharing = layout.dp if layout.distributed_optimizer else 1
    return {
        "weights": parameters * dtype.itemsize,
        "gradients": parameters * 4,
        "optimizer": parameters * (masters + 8) / sharing,
        "update": 4 * parameters / sharing if device == "cuda" else 2 * 4 * largest,
    }


def average_bytes(parameters: int, dtype: torch.dtype) -> int:
    """A self-teacher: the student's average in its dtype, and in fp32 where that is narrower, to accumulate in."""
    return parameters * (dtype.itemsize + (4 if dtype.itemsize < 4 else 0))
