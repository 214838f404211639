"""A few large pieces of work on a CPU, each by one thread from beginning to end.

Why: torch divides every operation between its threads, and each operation waits for all of them. A loss over tiles is
thousands of short operations; on a machine with other work each would wait for a thread that the scheduler has put
aside. Here a thread takes a whole piece (some tokens with all their tiles, or a range of vocabulary rows), so threads
wait for each other a few times per chunk. With one thread nothing changes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .chunks import slices

Result = TypeVar("Result")
SMALLEST_WORK = 1 << 20
"""Logits below which the threads of a piece cost more than they save."""


def pieces(x: Tensor, columns: int, *, dim: int = -1, step: int = 1) -> list[slice]:
    """Slices that cover a dimension of x, on a CPU as many as there are threads, of about equal size and each but the
    last a multiple of `step`. One slice on a GPU, with one thread, and where each position's work, `columns` logits,
    adds up to little."""
    total = x.shape[dim]
    is_small = total * columns < SMALLEST_WORK
    threads = 1 if is_small or x.device.type != "cpu" or _is_traced() else torch.get_num_threads()
    share = -(-max(total, 1) // threads)
    return list(slices(total, -(-share // step) * step))


def in_threads(work: Callable[[slice], Result], parts: Sequence[slice]) -> list[Result]:
    """[work(part) for part in parts], each in a thread of its own that divides no operation further.

    `work` records no gradients, and writes only what no other part reads or writes. An exception in it is raised here.
    """
    if len(parts) < 2:
        return [work(part) for part in parts]
    threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(part: slice) -> Result:  # a new thread has torch's defaults
        torch.set_num_threads(1)
        with torch.inference_mode(is_inference), torch.no_grad():
            return work(part)

    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(run, parts))
    finally:
        torch.set_num_threads(threads)  # torch remembers the last call of any thread, for threads to come


def _is_traced() -> bool:
    """True under a TorchDispatchMode (fake tensors, counters of FLOPs or memory), which other threads do not see."""
    return torch._C._len_torch_dispatch_stack() > 0
