"""Packing loses nothing and keeps every target beside the state that predicts it; the order of rows has no state."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vold.config.schema import CurriculumConfig
from vold.data.order import PromptOrder, rows_of_step
from vold.data.packing import Replicas, pack
from vold.teacher.scorer import only_sequences
from vold.types import Prompt, Sample

lengths = st.integers(1, 9)
weights = st.tuples(st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.25]))
groups = st.tuples(lengths, st.lists(st.tuples(lengths, weights), min_size=1, max_size=5))


def samples_of(groups):
    """A group is the prompt's length, and of each response the length and the two weights. No id occurs twice."""
    samples, token = [], count()
    draw = lambda length: tuple(islice(token, length))  # noqa: E731
    for number, (prompt_length, responses) in enumerate(groups):
        prompt = Prompt(str(number), draw(prompt_length), "")
        for length, (pg_weight, kl_weight) in responses:
            logps = tuple(-0.5 * (i + 1) for i in range(length))
            samples.append(Sample(prompt, draw(length), 1.5, pg_weight, kl_weight, logps))
    return samples


def read_before(micro, source):
    """(ids, positions) of what attention shows the query at `source`, itself included."""
    tokens = micro.tokens
    segment = int(torch.searchsorted(tokens.cu_seqlens, source, right=True)) - 1
    keys = torch.arange(len(tokens.input_ids_T)) if tokens.kv_index_K is None else tokens.kv_index_K
    later = int(tokens.cu_seqlens[segment + 1]) - 1 - source
    seen = keys[tokens.cu_seqlens_k[segment] : tokens.cu_seqlens_k[segment + 1] - later]
    return tokens.input_ids_T[seen].tolist(), tokens.position_ids_3T[:, seen].tolist()


def check_targets(micro, samples, sequence_n):
    """Each target is predicted by a state that has read exactly what precedes the target in its sample."""
    assert micro.target_N.tolist() == [
        token for row in dict.fromkeys(sequence_n.tolist()) for token in samples[micro.sample_B[row]].response_ids
    ]
    for source, target, row in zip(micro.source_N.tolist(), micro.target_N.tolist(), sequence_n.tolist(), strict=True):
        sample = samples[micro.sample_B[row]]
        before = [*sample.prompt.token_ids, *sample.response_ids[: sample.response_ids.tolist().index(target)]]
        ids, positions = read_before(micro, source)
        assert ids == before and positions == [list(range(len(before)))] * 3
    tokens = micro.tokens
    assert tokens.cu_seqlens[0] == tokens.cu_seqlens_k[0] == 0 and tokens.cu_seqlens[-1] == tokens.input_ids_T.numel()
    assert (tokens.cu_seqlens.diff() > 0).all(), "kernels need a query in every segment"


@settings(max_examples=150, deadline=None)
@given(st.lists(groups, min_size=0, max_size=5), st.integers(18, 60), st.integers(1, 5))
def test_pack(groups, max_tokens, replicas):
    samples = samples_of(groups)
    shares = [pack(samples, max_tokens=max_tokens, replicas=Replicas(replicas, rank)) for rank in range(replicas)]
    assert len({len(share.micro_batches) for share in shares}) == 1, "every replica takes part in every reduction"
    micro_batches = [micro for share in shares for micro in share.micro_batches]
    placed = [place for micro in micro_batches for place in micro.sample_B]
    assert sorted(placed) == [i for i, s in enumerate(samples) if s.pg_weight or s.kl_weight]
    for micro in micro_batches:
        assert micro.tokens.input_ids_T.numel() <= max_tokens
        if not micro.sample_B:
            assert micro.target_N.numel() == 0
            continue
        check_targets(micro, samples, micro.sequence_N)
        for row, place in enumerate(micro.sample_B):
            sample, own = samples[place], micro.sequence_N == row
            assert set(micro.pg_weight_N[own].tolist()) == {sample.pg_weight}
            assert set(micro.kl_weight_N[own].tolist()) == {sample.kl_weight}
            assert micro.logp_rollout_N[own].tolist() == list(sample.logp_rollout)


def test_a_prompt_is_read_once_for_its_responses():
    learns = (1.0, 0.0)
    samples = samples_of([(7, [(3, learns), (5, learns), (1, learns), (4, (0.0, 0.0))]), (2, [(6, learns)])])
    [micro] = pack(samples, max_tokens=99).micro_batches
    assert micro.tokens.input_ids_T.numel() == 7 + 2 + 4 + 0 + 2 + 5, "without what predicts nothing"
    assert micro.tokens.kv_index_K.numel() == (7 + 2) + (7 + 4) + (2 + 5)
    for alone in pack(samples, max_tokens=12).micro_batches:
        assert alone.tokens.kv_index_K is None, "nobody else reads these keys"


@settings(max_examples=150, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.data())
def test_the_teacher_reads_what_its_sequences_need(groups, data):
    samples = [replace(sample, pg_weight=1.0) for sample in samples_of(groups)]
    [micro] = pack(samples, max_tokens=999).micro_batches
    kept = data.draw(st.sets(st.integers(0, len(samples) - 1), min_size=1))
    rows_n = torch.isin(micro.sequence_N, torch.tensor(sorted(kept))).nonzero()[:, 0]
    reduced = only_sequences(micro, rows_n)
    check_targets(reduced, samples, micro.sequence_N[rows_n])
    needed = {id for row in kept for id in samples[micro.sample_B[row]].response_ids[:-1]}
    needed |= {id for row in kept for id in samples[micro.sample_B[row]].prompt.token_ids}
    assert sorted(reduced.tokens.input_ids_T.tolist()) == sorted(needed)


def test_replicas_get_equal_work_where_attention_counts():
    """Lengths spread over a factor of 50 and a cost that is half quadratic for the longest: within 2 % of the mean."""
    draw = random.Random(0)
    samples = samples_of([(1, [(int(160 * 50 ** draw.random()), (1.0, 0.0))]) for _ in range(256)])
    cost = lambda queries, keys: queries + queries * (2 * keys - queries) / 8000  # noqa: E731
    works = []
    for rank in range(8):
        share = pack(samples, max_tokens=16384, replicas=Replicas(8, rank, cost))
        lengths = [n for micro in share.micro_batches for n in micro.tokens.cu_seqlens.diff().tolist()]
        works.append(sum(cost(length, length) for length in lengths))
    assert max(works) / (sum(works) / 8) < 1.02, works


@pytest.mark.parametrize(("groups", "replicas", "pieces"), [(1, 4, 4), (4, 4, 4), (6, 4, 12), (12, 4, 12)])
def test_a_prompt_is_read_again_only_to_give_all_replicas_work(groups, replicas, pieces):
    """Groups of 16 equal responses; whole groups would leave replicas of the first and third case idle."""
    samples = samples_of([(20, [(51, (1.0, 0.0))] * 16)] * groups)
    shares = [pack(samples, max_tokens=9999, replicas=Replicas(replicas, rank)) for rank in range(replicas)]
    micro_batches = [micro for share in shares for micro in share.micro_batches]
    counts = [sum(len(micro.sample_B) for micro in share.micro_batches) for share in shares]
    assert counts == [16 * groups // replicas] * replicas
    assert sum(micro.tokens.input_ids_T.numel() for micro in micro_batches) == 20 * pieces + 16 * 50 * groups


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


def test_the_order_of_prompts_is_that_of_the_rows_whatever_is_taken_at_a_time():
    order, taken = PromptOrder(10, seed=3), []
    for size in (4, 1, 0, 7, 8):
        rows = order.take(size)
        order.update_pass_rates(rows, [1.0] * size)
        taken += rows
    assert taken == [row for step in range(5) for row in rows_of_step(step, rows=10, per_step=4, seed=3)]


def test_a_prompt_outside_the_curriculum_is_passed_over_once():
    """Rows 0 and 1 are solved, row 2 never is, row 3 could not be judged."""
    order = PromptOrder(4, seed=0, curriculum=CurriculumConfig(lowest=0.1, highest=0.9))
    first = order.take(4)
    assert sorted(first) == [0, 1, 2, 3]
    order.update_pass_rates([0, 1, 2, 3], [1.0, 0.95, 0.0, None])
    assert order.take(1) == [3] and sorted(order.take(4)) == [0, 1, 2, 3], "they are asked again the time after"
    order.update_pass_rates([2], [0.5])
    assert sorted(order.take(4)) == [0, 1, 2, 3]


def test_all_solved_does_not_end_the_search():
    order = PromptOrder(3, seed=0, curriculum=CurriculumConfig(highest=0.5))
    for _ in range(3):
        rows = order.take(3)
        order.update_pass_rates(rows, [1.0] * 3)
        assert sorted(rows) == [0, 1, 2]


def test_a_composed_file_is_read_as_it_lies():
    """data.shuffle = false: whole epochs, and steps that go over an epoch's edge."""
    assert rows_of_step(1, rows=5, per_step=3, seed=None) == [3, 4, 0]
    order = PromptOrder(5, seed=None)
    assert order.take(3) + order.take(4) == [0, 1, 2, 3, 4, 0, 1]
