"""The CPU platform: everything that makes megatron-core 0.16 run without a GPU.

Megatron writes its device as a literal (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`). On a machine
without CUDA `install()` makes torch use the CPU for those; with CUDA it does nothing. No Megatron source is replaced.

A run on this platform cannot catch: a tensor left on the wrong device, anything about bfloat16 kernels, NCCL
(ordering, time-outs, several communicators), races between communication and compute streams (`overlap_*`), CUDA
graphs, memory. Random numbers come from the CPU generator, so dropout differs from a GPU run. The mode is per
thread: it does not apply to code that Megatron runs in other threads or processes (asynchronous checkpoint writers).
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
# Megatron's gradient clipping and distributed optimizer compare `Tensor.type()` with these strings.
CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def _names_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"`, `.cuda()`, `.to("cuda")` mean the CPU; `.type()` names the CUDA type to Megatron only."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _device}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _device, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_by_megatron():
            return CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


_mode: _CudaMeansCpu | None = None
_thread: int | None = None  # that entered it
_device = CPU  # what "cuda" means


def install() -> None:
    """Enter the CPU platform for the rest of the process; a no-op with CUDA and when called again."""
    global _mode, _thread
    if torch.cuda.is_available() or _mode is not None:
        return
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*_args, **_kwargs):
        return torch.random.get_rng_state()

    def set_state(state, *_args, **_kwargs):
        torch.random.set_rng_state(state)

    torch.cuda.current_device = lambda: _device
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = torch.random.manual_seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    _mode, _thread = _CudaMeansCpu(), threading.get_ident()
    _mode.__enter__()


def name() -> str:
    """The processor's name; its kind where the system does not tell. The last bits of sums depend on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, "cuda" means the meta device, whose tensors have no memory (see launch.fake_layout)."""
    global _device
    _device = torch.device("meta")
    try:
        yield
    finally:
        _device = CPU


@contextmanager
def paused() -> Iterator[None]:
    """Leave the CPU platform inside, for long stretches without Megatron: it costs every call of torch a few
    microseconds (about a tenth of a tiny model's rollout). Does nothing in other threads than that of `install`."""
    if _mode is None or threading.get_ident() != _thread:
        yield
        return
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()
