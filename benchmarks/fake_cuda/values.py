"""Numbers of small tensors that depend on nothing but what the host sent: boundaries, indices, masks, weights.

A copy on the CPU follows such a tensor through every operation, so that the shapes which depend on it (nonzero, a mask,
bincount) and the branches which read it are the real ones. Other tensors have no numbers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

LARGEST = 1 << 18
"""Elements of the largest tensor whose numbers are followed."""
NOT_FOLLOWED = ("empty", "new_empty", "rand", "normal", "uniform", "bernoulli")
JOINS = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)
_stale: set[int] = set()  # storages of numbers, part of which was overwritten by unknown ones


def numbers_of(tensor: Tensor) -> Tensor | None:
    """The numbers of a tensor, on the CPU; None where they are not known."""
    if not isinstance(tensor, FakeTensor):
        return tensor if tensor.device.type == "cpu" and tensor.numel() <= LARGEST else None
    numbers = getattr(tensor, "numbers", None)
    return None if numbers is None or numbers.untyped_storage()._cdata in _stale else numbers


def forget(tensor: Tensor) -> None:
    """Unknown numbers were written into the tensor, and so into its views."""
    numbers = getattr(tensor, "numbers", None)
    if numbers is not None:
        storage = numbers.untyped_storage()
        if storage._cdata not in _stale:
            _stale.add(storage._cdata)
            weakref.finalize(storage, _stale.discard, storage._cdata)
        tensor.numbers = None


def real_result(func, args: tuple, kwargs: dict, tensors: Sequence[Tensor]) -> Any:
    """What an operation returns on the CPU; None where a number that it reads is not known. One that works in place
    writes into the known numbers of its target, which are forgotten where it reads unknown ones. tensors: all among
    the arguments."""
    written = tree_leaves(_written(func, args, kwargs)) if func._schema.is_mutable else ()
    targets = [x for x in written if isinstance(x, FakeTensor)]
    if func is torch.ops.aten.copy_.default and targets and _is_set_whole(*args[:2]):
        with torch._C._DisableTorchDispatch():
            args[0].numbers = torch.empty(args[0].shape, dtype=args[0].dtype)
    if func in JOINS and _can_be_filled(tensors):
        known = [numbers_of(tensor) for tensor in tensors]
        with torch._C._DisableTorchDispatch():
            pairs = zip(tensors, known, strict=True)
            filled = [torch.ones(x.shape, dtype=x.dtype) if n is None else n for x, n in pairs]
            return func(filled, *args[1:], **kwargs)
    known = all(numbers_of(tensor) is not None for tensor in tensors) and _is_small(func, args)
    if not known or func.__name__.startswith(NOT_FOLLOWED):
        for target in targets:
            forget(target)
        return None
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    if kwargs.get("device") is not None or not tensors:
        kwargs = {**kwargs, "device": torch.device("cpu")} if "device" in _names(func) else kwargs
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)


def attach(out, result) -> None:
    """Give the tensors of a result their numbers."""
    if isinstance(out, FakeTensor) and isinstance(result, Tensor):
        out.numbers = result
    elif result is not None:
        for leaf, numbers in zip(tree_leaves(out), tree_leaves(result), strict=False):
            if isinstance(leaf, FakeTensor) and isinstance(numbers, Tensor) and leaf.shape == numbers.shape:
                leaf.numbers = numbers


def fake_like(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device` with these numbers, made under FakeTensorMode."""
    out = torch.empty_strided(numbers.shape, numbers.stride(), dtype=numbers.dtype, device=device)
    attach(out, numbers)
    return out


def _can_be_filled(tensors: Sequence[Tensor]) -> bool:
    """True for a few floats that the host reads together: those that are not known are read as 1, as they are alone."""
    some = any(numbers_of(tensor) is not None for tensor in tensors)
    return some and sum(x.numel() for x in tensors) <= 64 and all(x.is_floating_point() for x in tensors)


def _is_set_whole(target: Tensor, source: Tensor) -> bool:
    return numbers_of(target) is None and numbers_of(source) is not None and target.numel() <= LARGEST


def _names(func) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _written(func, args: tuple, kwargs: dict) -> list:
    pairs = [*zip(args, func._schema.arguments, strict=False)]
    pairs += [(kwargs[a.name], a) for a in func._schema.arguments if a.name in kwargs]
    return [value for value, argument in pairs if argument.is_write]


def _is_small(func, args: tuple) -> bool:
    """False for a factory of a large tensor, or an expansion to one that is then written out."""
    sizes = [x for x in args if isinstance(x, list | tuple) and x and all(isinstance(n, int) for n in x)]
    return all(math.prod(max(n, 1) for n in size) <= LARGEST for size in sizes)


def _on_cpu(value):
    if isinstance(value, Tensor):
        return numbers_of(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value
