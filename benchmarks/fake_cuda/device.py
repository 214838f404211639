"""torch.cuda without a device: enough of it for vold, Megatron, Liger and Triton to take their GPU branches.

`install` changes this process for good: use one of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KNOWN_TORCH = ("2.11", "2.13")
"""Releases whose internals this package has been run with."""
CUDA, META = 1, 14  # c10::DeviceType
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
NAME, MULTIPROCESSORS, MEMORY = "NVIDIA H200", 132, 143771 << 20


def unsupported() -> str | None:
    """Why this package cannot be used here, or None."""
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in KNOWN_TORCH:
        return f"fake CUDA knows torch {' and '.join(KNOWN_TORCH)}; this is {torch.__version__}"
    if torch.cuda.is_available():
        return "fake CUDA needs a process without a visible GPU (CUDA_VISIBLE_DEVICES=)"
    if sys.platform != "linux":
        return "fake CUDA replaces a symbol of libc10.so, which is on Linux"
    return None


def install(*, flash_attn: bool = True) -> None:
    """Make this process believe in one CUDA device. flash_attn: make the package importable, as a record of calls.
    Raises RuntimeError where `unsupported` names a reason."""
    if reason := unsupported():
        raise RuntimeError(reason)
    _device_guard()
    _torch_cuda()
    _fake_tensor_mode()
    _triton()
    _object_collectives()
    if flash_attn:
        _flash_attn()


def _device_guard() -> None:
    """torch switches devices through a table of guards; CUDA gets the one of meta, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, GUARDS)
    assert guards[META], "the order of c10::DeviceType has changed"
    guards[CUDA] = guards[META]


class _Event:
    def __init__(self, *_args, **_options): ...
    def record(self, *_args) -> None: ...
    def wait(self, *_args) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _other) -> float:
        return 1.0

    def synchronize(self) -> None:
        note_wait("event.synchronize")


class _Stream:
    def __init__(self, *_args, **_options): ...
    def wait_stream(self, _other) -> None: ...
    def wait_event(self, _event) -> None: ...
    def record_event(self, *_args) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        note_wait("stream.synchronize")


class _Nothing(contextlib.nullcontext):
    def __init__(self, *_args):
        super().__init__()


def _torch_cuda() -> None:
    properties = types.SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=MULTIPROCESSORS, total_memory=MEMORY, warp_size=32
    )
    constant: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (MEMORY, MEMORY),
    }
    ignored = ("_lazy_init", "set_device", "manual_seed", "manual_seed_all", "set_rng_state", "empty_cache")
    ignored += ("reset_peak_memory_stats", "_check_capability")
    for name, value in (constant | dict.fromkeys(ignored)).items():
        setattr(torch.cuda, name, lambda *_args, _value=value, **_options: _value)
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.get_rng_state = lambda *_args, **_options: torch.zeros(16, dtype=torch.uint8, device="cpu")
    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    megatron_random._set_cuda_rng_state = lambda *_args, **_options: None
    torch.cuda.synchronize = lambda *_args, **_options: note_wait("torch.cuda.synchronize")
    torch.cuda.nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda: None)
    torch.cuda.Event, torch.cuda.Stream = _Event, _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_args: _Stream()
    torch.cuda.stream = torch.cuda.device = _Nothing


def _fake_tensor_mode() -> None:
    """FakeTensorMode would open the device, and a module would not move its parameters."""
    from torch._subclasses import fake_tensor
    from torch.optim import optimizer as optimizers

    fake_tensor.init_gpu_context = lambda *_args, **_options: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda _mode: True)
    fake_tensor.FakeTensor.tolist = torch.Tensor.tolist  # its own reads element by element
    optimizers._foreach_supported_types.append(fake_tensor.FakeTensor)  # as torch chooses for parameters on CUDA
    nn.Module.to, nn.Module.cuda = _move, lambda module, *_: _move(module, torch.device("cuda", 0))


def _move(module: nn.Module, *args, **options) -> nn.Module:
    """nn.Module.to with new parameters: the old ones' `data` cannot change its device. Attributes and ties stay."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                data = parameter.detach().to(device, dtype if parameter.is_floating_point() else None)
                moved[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                vars(moved[id(parameter)]).update(vars(parameter) | vars(moved[id(parameter)]))
            part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return module


# -- what the trace is told -----------------------------------------------------------------------------------------

_trace: Any = None


def use_trace(trace) -> None:
    """Write waits, launches and attention calls into this trace from now on (None: nowhere)."""
    global _trace
    _trace = trace


def note_wait(kind: str) -> None:
    """The host waits for the device here."""
    if _trace is not None:
        _trace.wait(kind)


# -- Triton ----------------------------------------------------------------------------------------------------------


def _triton() -> None:
    from triton.runtime import jit

    jit.KernelInterface.__getitem__ = _launcher


def _launcher(kernel, grid) -> Callable:
    """What `kernel[grid]` is: a function that checks and records a launch."""

    def launch(*args, num_warps=None, num_stages=None, num_ctas=None, **options) -> None:
        function = kernel
        while hasattr(function, "fn"):  # autotuners and heuristics around a JITFunction
            function = function.fn
        arguments = inspect.signature(function).bind(*args, **options).arguments
        if _trace is not None:
            tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
            distinct: dict[int, str] = {}
            for name, tensor in tensors.items():
                distinct.setdefault(id(tensor), name)  # an unused pointer is another's
            _trace.launch(function.__name__, {name: tensors[name] for name in distinct.values()})

    return launch


# -- flash-attn ------------------------------------------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    """The checks of flash-attn's C++ and the tensors that it makes."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bounds: tuple, options: dict) -> Tensor:
        cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = bounds
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16), q.dtype
        assert all(x.is_cuda for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)), "flash-attn got a tensor on the CPU"
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "flash-attn needs a contiguous last dimension"
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
        assert isinstance(longest_q, int) and isinstance(longest_k, int)
        assert q.shape[2] <= 256 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
        out, totals = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1::-1]).float()
        ctx.save_for_backward(q, k, v, out, totals)
        ctx.options = options
        if _trace is not None:
            _trace.attention("flash_attn forward", (q, k, v), (out,), bounds, options)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, out, totals = ctx.saved_tensors
        assert d_out.dtype == q.dtype and d_out.shape == out.shape
        _scratch = torch.empty_like(totals), torch.empty_like(q, dtype=torch.float32)  # its dQ is fp32
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        if _trace is not None:
            _trace.attention("flash_attn backward", (d_out, q, k, v, out), gradients, (), ctx.options)
        return *gradients, None, None


def _flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2.8."""
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _FlashAttention.apply(q, k, v, bounds, {"causal": causal, "deterministic": deterministic})


def _flash_attn() -> None:
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)  # found by importlib.util.find_spec
    package.flash_attn_varlen_func = _flash_attn_varlen_func
    sys.modules["flash_attn"] = package


# -- collectives of Python objects -----------------------------------------------------------------------------------


def _object_collectives() -> None:
    """Through NCCL they copy to the device and back: the host waits. The fake group would return garbage."""
    import torch.distributed as dist

    def all_gather_object(objects: list, value, group=None) -> None:
        note_wait("all_gather_object")
        objects[:] = [value] * len(objects)

    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = lambda *_args, **_options: note_wait("broadcast_object_list")
