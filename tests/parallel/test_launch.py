"""Launch facts, layouts and two-process runs over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from support import tiny
from vold.parallel.launch import LaunchEnvironment, initialise

WORKERS = Path(__file__).with_name("workers.py")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_worker(launch, processes: int, *arguments: str) -> None:
    """Run a worker and require `ok` of every rank (two ranks' lines may run together)."""
    run = launch(processes, WORKERS, *arguments)
    assert run.returncode == 0 and run.stdout.count("ok") == processes, run.stdout + run.stderr


def test_without_torchrun_the_world_is_one(layout, monkeypatch):
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    facts = LaunchEnvironment.from_environment()
    assert (facts.rank, facts.world, facts.local_rank) == (0, 1, 0)
    assert (layout.tp, layout.pp, layout.dp, layout.vpp, layout.sp) == (1, 1, 1, None, False)


def test_facts_come_from_the_environment(monkeypatch):
    for variable, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    facts = LaunchEnvironment.from_environment()
    assert (facts.rank, facts.world, facts.local_rank) == (5, 8, 1)


def test_initialising_again_keeps_the_groups_and_reseeds(layout):
    first = initialise(1, 1, seed=7)
    draw = torch.rand(3)
    again = initialise(1, 1, seed=7)
    assert again.tp_group is first.tp_group is layout.tp_group
    assert torch.equal(torch.rand(3), draw)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tp=2, pp=1), r"tp=2 x pp=1 = 2 does not divide the world of 1 processes: start a multiple of 2"),
        (dict(tp=0, pp=1), "at least 1, got tp=0"),
        (dict(cp=0), "at least 1, got cp=0"),
        (dict(tp=2, cp=4), r"tp=2 x pp=1 x cp=4 = 8 does not divide the world of 1 processes: start a multiple of 8"),
        (dict(tp=1, pp=1, vpp=2), "vpp=2 needs pp of at least 2"),
        (dict(tp=1, pp=1, sp=True), "needs tp of at least 2"),
        (dict(ep=2), "ep=2 x etp=1 = 2 does not divide the 1 processes of a pipeline stage"),
        (dict(ep=0), "at least 1, got ep=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        initialise(**sizes, seed=0)
    assert "\n" not in str(error.value)


def test_threads_follow_omp_num_threads(layout):
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_two_ranks_reduce_and_equal_transformers_when_tensor_parallel(launch, tmp_path):
    families = ("qwen3", "qwen2_5_vl", "qwen3_vl")
    run_worker(launch, 2, *(x for f in families for x in (f, str(tiny.save(tiny.FAMILIES[f](), tmp_path / f)))))
