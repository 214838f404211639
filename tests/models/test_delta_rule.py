"""The gated delta rule over packed runs: against its recurrence and transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from vold.models.delta_rule import causal_convolution, recurrent_delta_rule, torch_delta_rule
from vold.models.runs import Run, RunLengths, Runs

CPU = torch.device("cpu")
KEY_HEADS, VALUE_HEADS, KEY, VALUE = 2, 4, 8, 12


def drawn(lengths, *, start: bool, dtype=torch.float32, seed=0):
    """(qkv, decay, beta, start) that need a gradient."""
    generator, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    qkv = [draw(tokens, heads, width) for heads, width in ((KEY_HEADS, KEY), (KEY_HEADS, KEY), (VALUE_HEADS, VALUE))]
    decay, beta = -draw(tokens, VALUE_HEADS).exp() * 0.1, draw(tokens, VALUE_HEADS).sigmoid()
    state = draw(len(lengths), VALUE_HEADS, KEY, VALUE) if start else None
    *qkv, decay, beta, state = (x if x is None else x.to(dtype).requires_grad_() for x in (*qkv, decay, beta, state))
    return tuple(qkv), decay, beta, state


def with_gradients(rule, inputs, lengths):
    qkv, decay, beta, state = inputs
    out, end = rule(qkv, decay, beta, state, RunLengths(tuple(lengths), CPU))
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, end)]
    leaves = [x for x in (*qkv, decay, beta, state) if x is not None]
    return [out.detach(), end.detach(), *torch.autograd.grad((out, end), leaves, upstream)]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (5, 3, 3, 1), (64,), (65, 64, 2), (130, 7)], ids=str)
def test_the_chunk_form_is_exact_to_the_recurrent_one(lengths, start):
    inputs = drawn(lengths, start=start, dtype=torch.float64)
    for ours, expected in zip(
        with_gradients(torch_delta_rule, inputs, lengths),
        with_gradients(recurrent_delta_rule, inputs, lengths),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_runs_side_by_side_equal_transformers_recurrence_of_each_alone():
    lengths = (70, 33, 2)
    (q, k, v), decay, beta, state = drawn(lengths, start=True)
    copies = VALUE_HEADS // KEY_HEADS
    out, end = torch_delta_rule((q, k, v), decay, beta, state, RunLengths(lengths, CPU))
    first = 0
    for number, length in enumerate(lengths):
        rows = slice(first, first := first + length)
        expected, last = torch_recurrent_gated_delta_rule(
            *(x[None, rows].repeat_interleave(copies, 2) for x in (q, k)),
            v[None, rows],
            g=decay[None, rows],
            beta=beta[None, rows],
            initial_state=state[number, None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        torch.testing.assert_close(out[rows], expected[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(end[number], last[0], rtol=0, atol=2e-6)


# three segments: prompt of 2 with response of 3; a prompt of its own; a second response to the first prompt
SEGMENTS, FIRST_KEYS = ((5, 5), (4, 4), (3, 5)), (0, 5, 0)


def test_a_shared_prompt_is_a_run_that_its_responses_go_on_from():
    runs = Runs.of(SEGMENTS, FIRST_KEYS, CPU)
    assert runs.beginning == (Run(5, 4), Run(0, 2))
    assert runs.following == (Run(2, 3, 1), Run(9, 3, 1))
    assert [group.lengths for group in runs.lengths] == [(4, 2), (3, 3)]
    assert runs.order_T.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4, 9, 10, 11]
    assert runs.order_T[runs.place_T].tolist() == [*range(12)]
    only = Runs.of(((2, 2), (3, 5)), (0, 0), CPU)  # a prompt whose first response has no token to read
    assert (only.beginning, only.following) == ((Run(0, 2),), (Run(2, 3, 0),))
    assert Runs.of(((3, 3),), (0,), CPU).following == ()


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_the_convolution_reads_what_is_before_a_token_in_its_sequence(width):
    x, weight = torch.randn(12, 5), torch.randn(5, 1, width)
    runs = Runs.of(SEGMENTS, FIRST_KEYS, CPU)
    ours = causal_convolution(x, weight, runs.windows(width))[runs.place_T]
    for tokens in ([0, 1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 9, 10, 11]):
        padded = torch.cat([torch.zeros(width - 1, 5), x[tokens]])
        expected = torch.stack([(padded[t : t + width] * weight[:, 0].T).sum(0) for t in range(len(tokens))])
        torch.testing.assert_close(ours[tokens], expected)
