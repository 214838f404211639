"""The three losses on a CPU with several threads: the results of one thread, the same bits at each run, and torch's own
threads as they were. A thread takes whole pieces of the work (`vold_kernels/threads.py`)."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import CLIP, INTERPRETED, gradients, policy_terms, problem, relative
from torch.utils.flop_counter import FlopCounterMode

from vold_kernels import linear_kl, linear_logprob, linear_policy_loss, threads

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the plain torch of a CPU")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "SMALLEST_WORK", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


CASE = problem(70, 5000, width=16, dtype=torch.float32)
CASE = replace(CASE, target_N=CASE.target_N % 4500)


def policy_loss(**options: float):
    terms = policy_terms(CASE)
    terms = replace(terms, pg_weight_N=torch.ones_like(terms.pg_weight_N))
    return gradients(linear_policy_loss(*CASE, terms, **CLIP, vocab_size=4500, **options).loss, CASE)


def logprob():
    return gradients(linear_logprob(*CASE, vocab_size=4500).square().sum(), CASE)


def divergence():
    other = problem(70, 5000, width=16, dtype=torch.float32, seed=1)
    weight_N = torch.linspace(0, 1, 70)
    return gradients(linear_kl(*CASE.leaves, *other.leaves, weight_N=weight_N, vocab_size=4500).loss, CASE)


LOSSES = {
    "policy loss": policy_loss,
    "policy loss with entropy": lambda: policy_loss(entropy_bonus=0.1),
    "policy loss, filtered": lambda: policy_loss(filter_eps=1e-3),
    "log-prob": logprob,
    "divergence": divergence,
}


@pytest.mark.parametrize("name", LOSSES)
def test_several_threads_compute_what_one_does(name, monkeypatch):
    parts = []
    original_map = threads.ThreadPoolExecutor.map

    def record(pool, work, given_parts):
        parts.extend(given_parts)
        return original_map(pool, work, given_parts)

    monkeypatch.setattr(threads.ThreadPoolExecutor, "map", record)
    several = [LOSSES[name]() for _ in range(2)]
    assert torch.get_num_threads() == 3 and len(parts) >= 6
    torch.set_num_threads(1)
    one = LOSSES[name]()
    for first, second, alone in zip(*several, one, strict=True):
        assert torch.equal(first, second) and relative(first, alone) < 1e-6


def test_inference_mode_and_errors_cross_to_the_threads():
    with torch.inference_mode():
        assert linear_logprob(*CASE).is_inference()

    def fail(part: slice) -> None:
        raise RuntimeError(f"part {part.start}")

    with pytest.raises(RuntimeError, match="part 0"):
        threads.in_threads(fail, [slice(0, 1), slice(1, 2)])
    assert torch.get_num_threads() == 3


def test_counters_see_every_operation():
    with FlopCounterMode(display=False) as counter:
        linear_logprob(*CASE)
    assert counter.get_total_flops() == 2 * 70 * 16 * 5000
