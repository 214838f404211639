"""A backward pass over torch's graph, in Python: torch's own engine asks the device for streams, and there is none.

Nodes run in the order of torch's engine (the latest first), and what a node saved is released after it ran, so that the
bytes alive are those of a real backward pass.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

Gradients = dict[int, Tensor]  # output number of a node -> the gradient that has arrived there


class PythonEngine:
    """Stands in for torch.autograd.Variable._execution_engine. after_accumulation: parameter -> called when its
    gradient is complete (Megatron's data-parallel wrapper)."""

    def __init__(self) -> None:
        self.after_accumulation: dict[int, Callable] = {}
        self._saved: list[_Saved] = []  # unpacked by the node that runs

    def install(self) -> None:
        """Replace torch's engine, and see Megatron's hooks, which cannot be read from a node."""
        from megatron.core.distributed import DistributedDataParallel

        make_hook = DistributedDataParallel._make_backward_post_hook

        def make_and_note_hook(wrapper, parameter):
            self.after_accumulation[id(parameter)] = make_hook(wrapper, parameter)
            return self.after_accumulation[id(parameter)]

        def set_and_note(ctx, value: bool) -> None:  # the attribute of C++ cannot be read
            ctx.materialize_grads = ctx.fills_missing_gradients = value

        DistributedDataParallel._make_backward_post_hook = make_and_note_hook
        FunctionCtx.set_materialize_grads = set_and_note
        torch.autograd.Variable._execution_engine = self

    def saving(self) -> AbstractContextManager:
        """Inside, tensors that are saved for backward can be released."""
        return torch.autograd.graph.saved_tensors_hooks(_Saved, self._unpack)

    def _unpack(self, saved: _Saved) -> Tensor:
        self._saved.append(saved)
        assert saved.tensor is not None, "backward through a graph a second time"
        return saved.tensor

    @torch.no_grad()
    def run_backward(
        self,
        tensors: Sequence[Tensor],
        grad_tensors: Sequence[Tensor | None],
        keep_graph: bool = False,
        create_graph: bool = False,
        inputs: Sequence = (),
        **_options,
    ) -> tuple:
        """As torch's engine: add the gradient of `tensors` to the leaves."""
        assert not create_graph and not inputs, "torch.autograd.grad is not followed here"
        arrived: dict[Any, Gradients] = {}
        roots = [(*_edge(tensor), gradient) for tensor, gradient in zip(tensors, grad_tensors, strict=True)]
        for node, output, gradient in roots:
            _arrive(arrived, node, output, gradient)
        missing = _dependencies(node for node, *_ in roots)
        count, ready = itertools.count(), []
        for node in {node for node, *_ in roots if not missing.get(node)}:
            heapq.heappush(ready, (*_order(node), next(count), node))
        while ready:
            *_, node = heapq.heappop(ready)
            gradients = self._run(node, arrived.pop(node, {}), keep_graph)
            for (following, output), gradient in zip(node.next_functions, gradients, strict=False):
                if following is None:
                    continue
                if gradient is not None:
                    _arrive(arrived, following, output, _fitted(gradient, following._input_metadata[output]))
                missing[following] -= 1
                if not missing[following]:
                    heapq.heappush(ready, (*_order(following), next(count), following))
            del gradients
        return ()

    def _run(self, node, arrived: Gradients, keep_graph: bool) -> tuple:
        if hasattr(node, "variable"):
            self._accumulate(node.variable, arrived.get(0))
            return ()
        if not arrived:
            return (None,) * len(node.next_functions)
        metadata = node._input_metadata
        gradients = [arrived.get(number) for number in range(len(metadata))]
        self._saved.clear()
        if isinstance(node, BackwardCFunction):
            if getattr(node, "fills_missing_gradients", True):
                gradients = [_zeros(m) if g is None else g for g, m in zip(gradients, metadata, strict=True)]
            found = node.apply(*gradients)
        else:
            found = node(*gradients)
        if not keep_graph:
            for saved in self._saved:
                saved.tensor = None
        return found if isinstance(found, tuple) else (found,)

    def _accumulate(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:
            assert gradient.dtype == parameter.dtype and gradient.shape == parameter.shape
            assert gradient.device == parameter.device
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if id(parameter) in self.after_accumulation:
            self.after_accumulation[id(parameter)]()


class _Saved:
    """A tensor that autograd keeps, until the node that needs it has run."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor


def _edge(tensor: Tensor) -> tuple[Any, int]:
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return tensor.view_as(tensor).grad_fn.next_functions[0]


def _order(node) -> tuple[int]:
    """Leaves at once, then the node that was made last."""
    return (-(2**63) if hasattr(node, "variable") else -node._sequence_nr(),)


def _dependencies(roots) -> dict[Any, int]:
    """Node -> edges that lead to it from nodes that a backward pass reaches."""
    missing: dict[Any, int] = {}
    seen, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                missing[following] = missing.get(following, 0) + 1
                stack.append(following)
    return missing


def _arrive(arrived: dict[Any, Gradients], node, output: int, gradient: Tensor) -> None:
    outputs = arrived.setdefault(node, {})
    outputs[output] = gradient if output not in outputs else outputs[output] + gradient


def _zeros(metadata) -> Tensor:
    return torch.zeros(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def _fitted(gradient: Tensor, metadata) -> Tensor:
    """The gradient as its node wants it: summed over dimensions that were expanded, in the dtype of the output."""
    if tuple(gradient.shape) != tuple(metadata.shape):
        gradient = gradient.sum_to_size(tuple(metadata.shape))
    return gradient if gradient.dtype == metadata.dtype else gradient.to(metadata.dtype)
