"""Packing loses nothing and keeps every target beside the state that predicts it; the order of rows has no state."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from vold.data.order import rows_of_step
from vold.data.pack import Replicas, pack
from vold.records import Prompt, Sample

lengths = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.25]))


def samples_of(rows):
    samples, token = [], 0
    for number, (prompt, response, pg_weight, kl_weight) in enumerate(rows):
        ids = tuple(range(token, token + prompt + response))
        token += len(ids)
        logps = tuple(-0.5 * (i + 1) for i in range(response))
        samples.append(Sample(Prompt(str(number), ids[:prompt], ""), ids[prompt:], 1.5, pg_weight, kl_weight, logps))
    return samples


@settings(max_examples=150, deadline=None)
@given(st.lists(lengths, min_size=0, max_size=12), st.integers(18, 60), st.integers(1, 5))
def test_pack(rows, max_tokens, replicas):
    samples = samples_of(rows)
    shares = [pack(samples, max_tokens=max_tokens, replicas=Replicas(replicas, rank)) for rank in range(replicas)]
    assert len({len(share.micro_batches) for share in shares}) == 1, "every replica takes part in every reduction"
    micro_batches = [micro for share in shares for micro in share.micro_batches]
    placed = [place for micro in micro_batches for place in micro.sample_B]
    assert sorted(placed) == [i for i, s in enumerate(samples) if s.pg_weight or s.kl_weight]
    for micro in micro_batches:
        ids, cu = micro.tokens.input_ids_T, micro.tokens.cu_seqlens
        assert ids.numel() <= max_tokens and cu[-1] == ids.numel() and cu[0] == 0
        if not micro.sample_B:
            assert micro.target_N.numel() == 0
            continue
        assert (ids[micro.source_N + 1] == micro.target_N).all(), "each state predicts the token after it"
        for row, place in enumerate(micro.sample_B):
            sample, own = samples[place], micro.sequence_N == row
            assert micro.target_N[own].tolist() == list(sample.response_ids)
            start, stop = cu[row], cu[row + 1]
            assert ids[start:stop].tolist() == [*sample.prompt.token_ids, *sample.response_ids]
            assert micro.tokens.position_ids_3T[:, start:stop].tolist() == [list(range(stop - start))] * 3
            assert set(micro.pg_weight_N[own].tolist()) == {sample.pg_weight}
            assert set(micro.kl_weight_N[own].tolist()) == {sample.kl_weight}
            assert micro.logp_rollout_N[own].tolist() == list(sample.logp_rollout)


def test_replicas_get_equal_work_where_attention_counts():
    """Lengths spread over a factor of 50 and a cost that is half quadratic for the longest: within 2 % of the mean."""
    draw = random.Random(0)
    samples = samples_of([(1, int(160 * 50 ** draw.random()), 1.0, 0.0) for _ in range(256)])
    cost = lambda length: length + length**2 / 8000  # noqa: E731
    works = []
    for rank in range(8):
        share = pack(samples, max_tokens=16384, replicas=Replicas(8, rank, cost))
        lengths = [n for micro in share.micro_batches for n in micro.tokens.cu_seqlens.diff().tolist()]
        works.append(sum(map(cost, lengths)))
    assert max(works) / (sum(works) / 8) < 1.02, works


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 15), st.integers(0, 3))
def test_each_epoch_sees_every_row_once_across_its_edge(rows, per_step, seed):
    steps = -(-3 * rows // per_step)
    drawn = [row for step in range(steps) for row in rows_of_step(step, rows=rows, per_step=per_step, seed=seed)]
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_order_is_a_function_of_seed_and_step():
    draw = lambda seed, step: rows_of_step(step, rows=1000, per_step=8, seed=seed)  # noqa: E731
    assert draw(0, 3) == draw(0, 3) != draw(1, 3)
    assert draw(0, 3) != draw(0, 4)
