"""What a step needs of a rank's memory, before there is a rank: parameters are counted, and forward and backward are run
on the meta device, where tensors have shapes and no memory, with every tensor that is alive on the books.

T packed tokens, D hidden width, N tokens with a loss, U head rows of a rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vold.models.language_model import LanguageModel, hidden_states
from vold.models.layer_shapes import shapes_of
from vold.parallel import cpu
from vold.records import PackedTokens


class LiveBytes(TorchDispatchMode):
    """Inside, bytes of tensors that were made and are alive: `now`, and the most there have been, `peak`. On any device,
    meta included; what an operator allocates for itself and frees again is not seen."""

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
    the packing lie on the CPU, all other tensors on meta. `chunk`: of a layout that `pretend` made."""
    model_parallel_cuda_manual_seed(0)  # Megatron asks for its named generators
    chunk.requires_grad_(train).train(train)
    gone = [p.register_post_accumulate_grad_hook(_into_main_grad) for p in chunk.parameters()] if train else []
    with cpu.on_meta(), shapes_of(device), torch.set_grad_enabled(train), LiveBytes() as live:
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
