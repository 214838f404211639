"""Vocabulary parallelism on a CPU: four gloo processes, groups of 1 to 4, unequal and all-padding shards."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_cases import (
    CLIP,
    PairProblem,
    Problem,
    assert_near,
    assert_same_record,
    coupled,
    gradients,
    pair_problem,
    policy_terms,
    problem,
    relative,
    small_chunks,
    token_weights,
)

from vold_kernels import linear_kl, linear_logprob, linear_policy_loss, linear_topk_kl, reference

WORLD = 4
CASES = (  # rows of each rank, vocab_size
    ((77,), None),
    ((77,), 60),
    ((30, 47), None),
    ((60, 17), 60),  # the second shard is all padding
    ((50, 7, 20), None),
    ((50, 7, 20), 53),  # the second shard is part padding, the third all
    ((31, 9, 25, 12), None),
    ((20, 30, 7, 20), 45),  # the last two shards are all padding
)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_every_shard_count_equals_the_specification(tmp_path: Path):
    mp.spawn(_worker, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)


def _worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, WORLD + 1)}
    for sizes, vocab_size in CASES:
        if rank < len(sizes):
            _check_logprob(sizes, rank, vocab_size, groups[len(sizes)])
            _check_policy_loss(sizes, rank, vocab_size, groups[len(sizes)])
            _check_kl(sizes, rank, vocab_size, groups[len(sizes)])
            _check_topk_kl(sizes, rank, vocab_size, groups[len(sizes)])
            _check_filter(sizes, rank, groups[len(sizes)])
    if rank < 2:
        _check_compiled(rank, groups[2])
    dist.barrier()
    dist.destroy_process_group()


def _full_and_shard(sizes: tuple[int, ...], rank: int, vocab_size: int | None) -> tuple[Problem, Problem, slice]:
    full = problem(11, sum(sizes))
    full = Problem(full.hidden_ND, full.weight_VD, full.target_N % (vocab_size or sum(sizes)))
    shard_rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    shard = Problem(full.hidden_ND, full.weight_VD[shard_rows], full.target_N).to(torch.float64)
    return full, shard, shard_rows


def _check_gradients(actual: tuple, expected: tuple, shard_rows: slice, vocab_size: int | None) -> None:
    assert relative(actual[0], expected[0]) < 1e-12
    assert expected[1].abs().sum() > 0
    assert_near(actual[1], expected[1][shard_rows], 1e-12)
    if vocab_size is not None:
        assert torch.all(actual[1][max(vocab_size - shard_rows.start, 0) :] == 0)


def _check_logprob(sizes: tuple[int, ...], rank: int, vocab_size: int | None, group: dist.ProcessGroup) -> None:
    full, shard, shard_rows = _full_and_shard(sizes, rank, vocab_size)
    keywords = {"temperature": 0.7, "return_entropy": True, "vocab_size": vocab_size}
    actual = linear_logprob(*shard, **keywords, tp_group=group, budget=small_chunks(30, columns=8))
    expected = reference.linear_logprob(*full, **keywords)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-12)
    upstream = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = gradients((upstream * torch.stack(actual)).sum(), shard)
    expected = gradients((upstream * torch.stack(expected)).sum(), full)
    _check_gradients(actual, expected, shard_rows, vocab_size)


def _check_policy_loss(sizes: tuple[int, ...], rank: int, vocab_size: int | None, group: dist.ProcessGroup) -> None:
    full, shard, shard_rows = _full_and_shard(sizes, rank, vocab_size)
    terms = policy_terms(Problem(full.hidden_ND, full.weight_VD[:vocab_size], full.target_N), temperature=0.7)
    keywords = {**CLIP, "temperature": 0.7, "vocab_size": vocab_size}
    bonus = {"entropy_bonus": 0.3}
    for case_terms, bonus_keywords, tokens in ((terms, {}, 3), (coupled(terms), bonus, 3), (coupled(terms), bonus, 11)):
        keywords_of_case = {**keywords, **bonus_keywords}
        actual = linear_policy_loss(
            *shard, case_terms, **keywords_of_case, tp_group=group, budget=small_chunks(47, tokens=tokens)
        )
        expected = reference.linear_policy_loss(*full, case_terms, **keywords_of_case)
        assert_same_record(actual, expected, 1e-12)
        actual, expected = (gradients(-1.7 * r.loss, case) for r, case in ((actual, shard), (expected, full)))
        _check_gradients(actual, expected, shard_rows, vocab_size)


def _check_kl(sizes: tuple[int, ...], rank: int, vocab_size: int | None, group: dist.ProcessGroup) -> None:
    full, weight_N = pair_problem(11, sum(sizes)), token_weights(11)
    shard_rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    shard = PairProblem(
        *(x[shard_rows] if "weight" in name else x for name, x in vars(full).items()),
    ).to(torch.float64)
    for divergence, top_k in (
        ("reverse_kl", None),
        ("forward_kl", None),
        ("jsd", None),
        ("forward_kl", 5),
        ("jsd", 58),
    ):
        keywords = {"weight_N": weight_N, "divergence": divergence, "alpha": 0.3, "top_k": top_k, "temperature": 0.7}
        keywords |= {"vocab_size": vocab_size}
        actual = linear_kl(*shard, **keywords, tp_group=group, budget=small_chunks(47, tokens=6))
        expected = reference.linear_kl(*full, **keywords)
        assert expected.loss != 0
        assert_near(actual.loss, expected.loss, 1e-12)
        assert_near(actual.kl_N, expected.kl_N, 1e-12)
        actual, expected = (gradients(-1.7 * r.loss, case) for r, case in ((actual, shard), (expected, full)))
        _check_gradients(actual, expected, shard_rows, vocab_size)


def _check_topk_kl(sizes: tuple[int, ...], rank: int, vocab_size: int | None, group: dist.ProcessGroup) -> None:
    """A teacher's ids lie on any of the ranks, on one of them none or all."""
    full, shard, shard_rows = _full_and_shard(sizes, rank, vocab_size)
    weight_N, draw = token_weights(11), torch.Generator().manual_seed(7)
    logq_NV = torch.randn(11, vocab_size or sum(sizes), dtype=torch.float64, generator=draw).mul(2).log_softmax(-1)
    logq_NV[0, : min(sizes[0], 20)] += 9  # all of the first shard
    top = logq_NV.log_softmax(-1).topk(6)
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        keywords = {"weight_N": weight_N, "divergence": divergence, "alpha": 0.3, "temperature": 0.7}
        keywords |= {"vocab_size": vocab_size}
        head = (shard.hidden_ND, shard.weight_VD, top.indices, top.values)
        actual = linear_topk_kl(*head, **keywords, tp_group=group, budget=small_chunks(47, tokens=4))
        expected = reference.linear_topk_kl(full.hidden_ND, full.weight_VD, top.indices, top.values, **keywords)
        assert expected.loss != 0
        assert_near(actual.loss, expected.loss, 1e-12)
        assert_near(actual.kl_N, expected.kl_N, 1e-12)
        actual, expected = (gradients(-1.7 * r.loss, case) for r, case in ((actual, shard), (expected, full)))
        _check_gradients(actual, expected, shard_rows, vocab_size)


def _check_filter(sizes: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> None:
    full, shard, shard_rows = _full_and_shard(sizes, rank, None)
    full, shard = (Problem(x.hidden_ND, 4 * x.weight_VD.detach(), x.target_N).to(torch.float64) for x in (full, shard))
    terms = policy_terms(full)
    filtered = linear_policy_loss(*shard, terms, **CLIP, tp_group=group, filter_eps=0.2)
    exact = gradients(reference.linear_policy_loss(*full, terms, **CLIP).loss, full)
    d_hidden_ND, d_weight_UD = gradients(filtered.loss, shard)
    assert filtered.dropped_mass > 0
    longest_weight, longest_hidden = (x.norm(dim=1).max() for x in (full.weight_VD, full.hidden_ND))
    assert 0 < (d_hidden_ND - exact[0]).norm() <= filtered.dropped_mass * longest_weight
    squared = (d_weight_UD - exact[1][shard_rows]).square().sum()
    dist.all_reduce(squared, group=group)
    assert 0 < squared.sqrt() <= filtered.dropped_mass * longest_hidden


def _check_compiled(rank: int, group: dist.ProcessGroup) -> None:
    _, shard, _ = _full_and_shard((30, 47), rank, None)

    def loss(hidden_ND, weight_VD, target_N):
        return linear_logprob(hidden_ND, weight_VD, target_N, tp_group=group).square().sum()

    expected = loss(*shard)
    actual = torch.compile(loss, backend="aot_eager", fullgraph=True)(*shard)
    assert torch.equal(actual, expected)
    for a, b in zip(gradients(actual, shard), gradients(expected, shard), strict=True):
        assert torch.equal(a, b)
