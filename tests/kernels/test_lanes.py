"""The two lanes of a GPU (`vold_kernels/lanes.py`), proved without one: the losses run on a CPU with lanes that record.

Every torch operation is recorded with the bytes that it reads and writes and with the lane it belongs to. Two
operations of different lanes that touch the same bytes, one of them writing, must be ordered by `rows()` or `wait`;
memory must not go back to its lane's allocator before the other lane's uses are known to be over. If so, every
interleaving that the two streams may choose computes the same bits. Removing any single `rows()` or `wait` must show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from kernel_cases import CLIP, DEVICE, INTERPRETED, coupled, gradients, policy_terms, problem, small_chunks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vold_kernels import ChunkBudget, head, linear_logprob, linear_policy_loss, one_pass
from vold_kernels.lanes import Lanes

MATMULS, ROWS = 0, 1


@dataclass
class Use:
    """Bytes [first, end) of a storage, touched by the operation number `position` of `lane`."""

    lane: int
    position: int
    writes: bool
    first: int
    end: int
    operation: str


@dataclass(eq=False)
class Memory:
    """A storage: who allocated it and who used it."""

    storage: StorageWeakRef
    owner: int
    uses: list[Use] = field(default_factory=list)


class RecordingLanes(Lanes, TorchDispatchMode):
    """Lanes that know, for each lane, how many operations of the other must be over (a vector clock).

    dropped: the number of the `rows()` or `wait` whose order is left out.
    """

    buffers = 2

    def __init__(self, dropped: int | None = None):
        super().__init__()
        self.lane, self.dropped, self.orders = MATMULS, dropped, 0
        self.counts, self.known = [0, 0], [0, 0]
        self.memories: dict[int, Memory] = {}
        self.shared: list[Memory] = []  # used by a lane that did not allocate it
        self.races: list[str] = []

    @contextmanager
    def rows(self) -> Iterator[list[int]]:
        self._order(ROWS, self.counts[MATMULS])
        done = []
        self.lane = ROWS
        yield done
        self.lane = MATMULS
        done.append(self.counts[ROWS])

    def wait(self, done: list[int]) -> None:
        self._order(MATMULS, done[0])

    def _order(self, lane: int, position: int) -> None:
        self._look_for_freed()
        if self.orders != self.dropped:
            self.known[lane] = max(self.known[lane], position)
        self.orders += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._look_for_freed()
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if is_view or any("Layout" in str(a.type) and a.name == "like" for a in schema.arguments):
            return result
        self.counts[self.lane] += 1
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in schema.arguments:
            is_written = bool(argument.alias_info and argument.alias_info.is_write)
            for tensor in tree_leaves(named.get(argument.name)):
                if isinstance(tensor, torch.Tensor):
                    self._use(tensor, is_written, str(func))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._use(tensor, True, str(func))
        return result

    def _use(self, tensor: torch.Tensor, writes: bool, operation: str) -> None:
        if not tensor.numel():
            return
        storage = StorageWeakRef(tensor.untyped_storage())
        memory = self.memories.get(storage.cdata)
        if memory is None or memory.storage.expired():
            memory = self.memories[storage.cdata] = Memory(storage, self.lane)
        last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        span = tensor.storage_offset() * tensor.itemsize, (last + 1) * tensor.itemsize
        use = Use(self.lane, self.counts[self.lane], writes, *span, operation)
        for other in memory.uses:
            is_ordered = other.lane == self.lane or other.position <= self.known[self.lane]
            touches = other.first < use.end and use.first < other.end and (other.writes or writes)
            if touches and not is_ordered:
                self.races.append(f"{other.operation} and {operation}")
        memory.uses.append(use)
        if self.lane != memory.owner and memory not in self.shared:
            self.shared.append(memory)

    def _look_for_freed(self) -> None:
        for memory in list(self.shared):
            if memory.storage.expired():
                self.shared.remove(memory)
                late = [u for u in memory.uses if u.lane != memory.owner and u.position > self.known[memory.owner]]
                self.races += [f"freed before {use.operation}" for use in late]


BUDGET = small_chunks(77, columns=40)  # 4 tokens a chunk, 2 tiles


def loss_of(case, terms=None, **options):
    terms = terms or policy_terms(case)
    terms = replace(terms, pg_weight_N=torch.ones_like(terms.pg_weight_N))
    return linear_policy_loss(*case, terms, **CLIP, budget=BUDGET, **options)


def policy_loss(tokens: int, **options):
    def run():
        case = problem(tokens, 77)
        return gradients(loss_of(case, **options).loss, case)

    return run


def frozen(side: int):
    def run():
        case = problem(11, 77)
        case.leaves[side].requires_grad_(False)
        (gradient,) = torch.autograd.grad(loss_of(case).loss, case.leaves[1 - side])
        return (gradient,)

    return run


def coupled_policy_loss():
    case = problem(11, 77)
    return gradients(loss_of(case, coupled(policy_terms(case))).loss, case)


def log_probs():
    case = problem(11, 77)
    logp_N, entropy_N = linear_logprob(*case, return_entropy=True, budget=BUDGET)
    return *gradients((logp_N + entropy_N).square().sum(), case), logp_N.detach()


CASES = {
    "1 chunk": policy_loss(3),
    "2 chunks": policy_loss(7),
    "5 chunks": policy_loss(18),
    "entropy": policy_loss(11, entropy_bonus=0.1),
    "filtered": policy_loss(11, filter_eps=0.3),
    "hidden frozen": frozen(0),
    "weight frozen": frozen(1),
    "coupled": coupled_policy_loss,
    "log-probs": log_probs,
}
cpu_only = pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="records the operations of plain torch")


def recorded(name: str, monkeypatch: pytest.MonkeyPatch, dropped: int | None = None):
    """(the lanes after the case ran on them, its results)."""
    lanes = RecordingLanes(dropped)
    twice = {name: 2 * getattr(BUDGET, name) for name in ("resident_bytes", "tile_bytes")}
    monkeypatch.setitem(globals(), "BUDGET", replace(BUDGET, **twice))
    with lanes:
        results = on_lanes(lanes, name, monkeypatch)
        lanes._look_for_freed()
    return lanes, results


def on_lanes(lanes: Lanes, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "lanes_of", lambda device, overlap: lanes)
    for module in (head, one_pass):  # the walk and the layout of a GPU, with the row functions of a CPU
        monkeypatch.setattr(module, "uses_triton", lambda device: True)
    return CASES[name]()


@cpu_only
@pytest.mark.parametrize("name", CASES)
def test_no_two_operations_race_and_every_order_is_needed(name, monkeypatch):
    with monkeypatch.context() as patch:
        lanes, results = recorded(name, patch)
    assert lanes.races == [] and lanes.orders >= 2 and min(lanes.counts) > 5
    for dropped in range(lanes.orders):
        with monkeypatch.context() as patch:
            assert recorded(name, patch, dropped)[0].races, f"order {dropped} of {lanes.orders} is not needed"
    one_lane = on_lanes(Lanes(), name, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(results, one_lane, strict=True))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_two_streams_compute_the_bits_of_one():
    case = problem(1500, 20000, width=64, dtype=torch.bfloat16)
    results = []
    for overlap in (True, False, True):
        budget = ChunkBudget(resident_bytes=(1 + overlap) * 512 * 20000 * 4, overlap=overlap)
        out = linear_policy_loss(*case, policy_terms(case), **CLIP, budget=budget)
        results.append((out.logp_N, *gradients(out.loss, case)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
