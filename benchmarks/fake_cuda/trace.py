"""What ran on the fake device, written down by the modes under which it runs."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vold.planning.meta_memory import LiveBytes

from . import device as fake_device
from .engine import PythonEngine
from .values import attach, fake_like, forget, numbers_of, real_result
from .work import Operation, Shape

ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "vold") + "/", str(ROOT / "kernels") + "/")
HARNESS = str(Path(__file__).parent)
aten = torch.ops.aten


class Trace:
    """Everything that one or several phases did.

    operations   Operation -> how often
    waits        (phase, kind, site) -> how often the host waited for the device
    issues       what a real device would refuse, or do by a copy that nobody asked for -> how often
    peaks        phase -> most bytes of CUDA tensors alive in it
    """

    def __init__(self) -> None:
        self.operations: Counter[Operation] = Counter()
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.issues: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.live = LiveBytes(device="cuda")
        self._phases = ["build"]
        self._segments: dict[tuple, tuple] = {}

    @property
    def phase(self) -> str:
        return self._phases[-1]

    @contextmanager
    def in_phase(self, name: str, **_options) -> Iterator[None]:
        """Charge what happens inside to this phase; also stands in for vold's PhaseTimers."""
        self.note_memory()
        self._phases.append(name)
        self.live.peak = self.live.now
        try:
            yield
        finally:
            self.note_memory()
            self._phases.pop()
            self.live.peak = self.live.now

    __call__ = in_phase

    def note_memory(self) -> None:
        for phase in self._phases:
            self.peaks[phase] = max(self.peaks[phase], self.live.peak)

    # -- what the modes and the stand-ins call -----------------------------------------------------------------------

    def wait(self, kind: str) -> None:
        self.waits[self.phase, kind, site()] += 1

    def issue(self, what: str) -> None:
        self.issues[f"{what} at {site()}"] += 1

    def launch(self, kernel: str, tensors: Mapping[str, Tensor]) -> None:
        """A Triton kernel, whose pointers must be on the device. Each is taken to be read and written once."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point():  # it may be written
                forget(tensor)
            if not tensor.is_cuda:
                self.issue(f"{kernel}: {name} is on {tensor.device}, and Triton cannot read it")
        shapes = tuple(_shape(tensor) for tensor in tensors.values())
        self.operations[Operation(self.phase, "triton", kernel, site(), shapes, ())] += 1

    def attention(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], bounds: tuple, options: Mapping
    ) -> None:
        """A call of an attention kernel; bounds: cu_seqlens of queries and keys. The backward call of a forward one has
        its segments."""
        if bounds:
            cumulative = [numbers_of(bound) for bound in bounds[:2]]
            assert all(x is not None for x in cumulative), "the boundaries of a packing do not come from the host"
            lengths = [x.diff().tolist() for x in cumulative]
            self._segments[tuple(inputs[0].shape)] = tuple(zip(*lengths, strict=True))
        segments = self._segments.get(tuple(inputs[0].shape), ())
        name += " deterministic" if options.get("deterministic") else ""
        shapes = [tuple(_shape(x) for x in tensors) for tensors in (inputs, outputs)]
        self.operations[Operation(self.phase, "attention", name, site(), *shapes, segments=segments)] += 1

    def aten(self, func, inputs: Sequence[Tensor], out) -> None:
        outputs = _tensors((out,))
        self.live.count(inputs, outputs)
        if not any(x.is_cuda for x in (*inputs, *outputs)):
            return
        ids = {id(x) for x in inputs}
        written = tuple(_shape(x) for x in outputs if id(x) in ids)
        made = tuple(_shape(x) for x in outputs if id(x) not in ids)
        shapes = tuple(map(_shape, inputs))
        name = func.__name__ if func.namespace == "aten" else f"{func.namespace}.{func.__name__}"
        self.operations[Operation(self.phase, "aten", name, site(), shapes, made, written)] += 1

    # -- reading -----------------------------------------------------------------------------------------------------

    def select(self, kind: str, *, phase: str = "", name: str = "", site: str = "") -> Counter[Operation]:
        """Operations of this kind whose phase, name and site contain the given text."""
        return Counter(
            {
                op: count
                for op, count in self.operations.items()
                if op.kind == kind and phase in op.phase and name in op.name and site in op.site
            }
        )

    def flops(self, **where: str) -> int:
        """FLOPs of the matrix products that `select` finds."""
        return sum(op.flops * count for op, count in self.select("aten", **where).items())

    def waits_by_site(self, *phases: str) -> dict[str, int]:
        """ "kind, site" -> waits of these phases (all without any)."""
        found: Counter[str] = Counter()
        for (phase, kind, where), count in self.waits.items():
            if not phases or phase in phases:
                found[f"{kind}, {where}"] += count
        return dict(sorted(found.items(), key=lambda row: (-row[1], row[0])))


def site() -> str:
    """file:function of the innermost frame of ours, and of Megatron's below it."""
    megatron, frame = "", sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_code.co_name}{megatron}"
        if not megatron and "/megatron/core/" in file:
            megatron = f" > megatron/{file.rsplit('/megatron/core/', 1)[1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return megatron[3:] or "elsewhere"


@contextmanager
def tracing(trace: Trace) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, and what happens to them is written into the trace. `install` comes first."""
    engine = PythonEngine()
    engine.install()
    fake_device.use_trace(trace)
    with contextlib.ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for entered in (_Operations(trace), _Calls(trace), engine.saving()):
            stack.enter_context(entered)
        yield mode
    fake_device.use_trace(None)


def _tensors(values: Sequence) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which may be lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> Shape:
    return Shape(_name(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()), tensor.device.type, tensor.itemsize)


# -- operations --------------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Every operation below autograd: recorded, checked, and given the numbers that are known."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        if func.namespace == "c10d":
            return self._collective(func, args, tensors)
        on_device = any(x.is_cuda for x in tensors)
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if func in (aten._assert_async.msg, aten._assert_async.default):
            return None
        self._note_copy(func, args, kwargs)
        result = real_result(func, args, kwargs, tensors)
        if func in DYNAMIC and kwargs.get("output_size") is None:
            if on_device:
                self.trace.wait(func._opname)
            out = DYNAMIC[func](args) if result is None else _as_fake(result, tensors[0].device)
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and _has_mask(args[1]):
            if on_device:
                self.trace.wait(f"{func._opname} by a mask")
            out = self._masked(func, args, result)
        elif func in (aten.addmm.dtype_out, aten.addmm.dtype):
            out = _wide_addmm(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        attach(out, result)
        if func._opname in ("mm", "addmm", "bmm", "baddbmm"):
            self._check_gemm(func, tensors)
        self.trace.aten(func, tensors, out)
        return out

    def _read(self, tensor: Tensor):
        if tensor.is_cuda:
            self.trace.wait("item")
        numbers = numbers_of(tensor)
        if numbers is not None:
            with torch._C._DisableTorchDispatch():
                return numbers.item()
        return 1.0 if tensor.is_floating_point() else tensor.dtype != torch.bool or True

    def _note_copy(self, func, args, kwargs) -> None:
        """Copies between host and device that make the host wait."""
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            source, target = args[0].device.type, torch.device(kwargs["device"]).type
            waits = not kwargs.get("non_blocking")
        elif func is aten.copy_.default:
            source, target = args[1].device.type, args[0].device.type
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            return
        if {source, target} == {"cpu", "cuda"} and waits:
            self.trace.wait("copy to the host" if target == "cpu" else "copy to the device")

    def _masked(self, func, args, result):
        if func is not aten.index.Tensor:
            return args[0] if func is aten.index_put_.default else torch.empty_like(args[0])
        if result is not None:
            return _as_fake(result, args[0].device)
        indices = [None if i is None else _rows_of(i) for i in args[1]]
        return func(args[0], indices)

    def _check_gemm(self, func, tensors: Sequence[Tensor]) -> None:
        """cuBLAS reads rows or columns that lie together; torch copies a matrix of another form first."""
        for tensor in tensors:
            if tensor.dim() == 2 and not _has_dense_rows(tensor):
                self.trace.issue(f"{func._opname}: strides {tensor.stride()} of {tuple(tensor.shape)}")

    def _collective(self, func, args, tensors: Sequence[Tensor]):
        for tensor in tensors:
            if not tensor.is_cuda:
                self.trace.issue(f"{func._opname}: NCCL got a tensor on {tensor.device}")
            if not tensor.is_contiguous():
                self.trace.issue(f"{func._opname}: NCCL got a tensor with strides {tensor.stride()}")
        shapes = tuple(map(_shape, tensors))
        self.trace.operations[Operation(self.trace.phase, "collective", func._opname, site(), shapes, ())] += 1
        work = FakeWork().boxed()
        results = [a for a in args if isinstance(a, list | Tensor)]
        count = len(func._schema.returns)
        return work if count == 1 else (*results[: count - 1], work)


def _as_fake(result, device: torch.device):
    if isinstance(result, Tensor):
        return fake_like(result, device)
    return type(result)(fake_like(x, device) for x in result)


def _has_mask(indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _rows_of(index: Tensor) -> Tensor:
    """Unknown rows that a mask selects: all of them."""
    if index.dtype not in (torch.bool, torch.uint8):
        return index
    return torch.empty(index.shape[0], dtype=torch.int64, device=index.device)


def _integers(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=like.device)


def _all_nonzero(args) -> Tensor:
    return _integers(args[0], args[0].numel(), args[0].dim())


def _all_different(args):
    x = args[0]
    return x.new_empty(x.numel()), _integers(x, x.numel()), _integers(x, x.numel())


def _no_guess(args):
    raise AssertionError("an output size that depends on numbers which are not known")


DYNAMIC: dict[object, Callable] = {
    aten.nonzero.default: _all_nonzero,
    aten.masked_select.default: _no_guess,
    aten.unique_consecutive.default: _all_different,
    aten._unique2.default: _all_different,
    aten.bincount.default: _no_guess,
    aten.repeat_interleave.Tensor: _no_guess,
}
"""Operations whose output has a size that depends on numbers -> what it is taken to be where they are not known."""


def _wide_addmm(self: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out=None, **_factors) -> Tensor:
    """addmm(out_dtype=...), which has no fake kernel in torch 2.13: bf16 in, fp32 out."""
    assert a.dtype == b.dtype and out_dtype in (a.dtype, torch.float32) and self.dtype in (out_dtype, a.dtype)
    assert a.shape[1] == b.shape[0] and tuple(self.shape) == (a.shape[0], b.shape[1])
    return torch.empty(self.shape, dtype=out_dtype, device=a.device) if out is None else out


def _has_dense_rows(x: Tensor) -> bool:
    (rows, columns), (row, column) = x.shape, x.stride()
    return (column == 1 and row >= max(1, columns)) or (row == 1 and column >= max(1, rows)) or 1 in x.shape


# -- calls that never reach a kernel as one operation ------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Methods that read memory, or name a device by a number."""

    def __init__(self, trace: Trace):
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        this = args[0] if args and isinstance(args[0], Tensor) else None
        if isinstance(kwargs.get("device"), int) and not isinstance(kwargs["device"], bool):
            kwargs = {**kwargs, "device": torch.device("cuda", kwargs["device"])}
        if func is torch.Tensor.tolist:
            return self._tolist(this)
        if func is torch.Tensor.numpy:
            return _numbers(this).numpy()
        if func is torch.Tensor.pin_memory:
            return this
        if func is torch.Tensor.is_pinned:
            return True
        if func in (torch.isfinite, torch.Tensor.isfinite) and numbers_of(this) is None:
            return torch.ones(this.shape, dtype=torch.bool, device=this.device)  # all is well in this world
        if func is torch.Tensor.cuda:
            return this.to(torch.device("cuda", 0))
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], int):
            args = (this, torch.device("cuda", args[1]), *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and this is not None and this.is_cuda:
            return CUDA_TYPES[this.dtype]
        if func is torch.tensor and args and isinstance(args[0], list | tuple):
            args = (_without_tensors(args[0]), *args[1:])
        if func == SET_DATA and hasattr(args[1], "fake_device"):
            args[0].fake_device = args[1].fake_device
        return func(*args, **kwargs)

    def _tolist(self, tensor: Tensor):
        if tensor.is_cuda:
            self.trace.wait("tolist")
        return _numbers(tensor).tolist()


SET_DATA = torch.Tensor.data.__set__
CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def _numbers(tensor: Tensor) -> Tensor:
    """The tensor's numbers, or ones."""
    numbers = numbers_of(tensor)
    with torch._C._DisableTorchDispatch():
        return torch.ones(tensor.shape, dtype=tensor.dtype) if numbers is None else numbers.detach()


def _without_tensors(values):
    """Nested lists whose tensors are read, one after the other, as torch.tensor reads them."""
    if isinstance(values, list | tuple):
        return [_without_tensors(value) for value in values]
    return values.item() if isinstance(values, Tensor) else values
