"""Statistics, rows and turns of the harness at tiny shapes; every importable provider gives the fp64 result."""

import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Plan, ProviderResult
from benchmarks.problem import Case, Problem, disagreement, errors, make_problem, policy_loss
from benchmarks.providers import FLOOR, OURS, PROVIDERS

CPU = torch.device("cpu")
FULL = Case("tiny", "full", 48, 16, 301, "float32")
FORWARD = Case("tiny", "forward", 48, 16, 301, "float32")


def fields(problem: Problem) -> Problem:
    for leaf in (problem.hidden_ND, problem.weight_VD):
        leaf.requires_grad_()
    return problem


def test_spread_is_the_median_with_the_fifths_around_it():
    assert harness.spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert harness.spread([2.0]) == (2.0, 2.0, 2.0)


def test_rows_carry_every_column_and_the_floor_of_the_same_run(tmp_path: Path):
    results = {
        FLOOR: ProviderResult(seconds=[0.5, 0.5, 0.5]),
        OURS: ProviderResult(seconds=[1.0, 2.0, 3.0], peak_bytes=3 * 2**20, errors={"loss": 1e-7, "d_weight": 2e-7}),
        "verl": ProviderResult(reason="needs a GPU"),
    }
    harness.write_rows(tmp_path / "kernels-cpu.csv", harness.csv_rows(FULL, results, harness.environment(CPU, 1)))
    floor, ours, verl = harness.read_rows(tmp_path / "kernels-cpu.csv")
    assert tuple(ours) == harness.COLUMNS
    assert float(ours["median_s"]) == statistics.median([1.0, 2.0, 3.0]) and float(ours["over_floor"]) == 4.0
    assert float(ours["peak_extra_mib"]) == 3.0 and ours["d_weight_error"] == "2.0e-07" and ours["logp_error"] == ""
    assert float(floor["over_floor"]) == 1.0
    assert (verl["status"], verl["reason"], verl["median_s"]) == ("not available", "needs a GPU", "")
    assert all(row[key] for row in (floor, ours, verl) for key in ("device", "torch", "commit", "package_version"))


def test_truth_is_that_of_autograd_in_fp64():
    case = Case("tiny", "full", 48, 16, 301, "float64")
    problem = fields(make_problem(case, CPU))
    logits_NV = problem.hidden_ND @ problem.weight_VD.T
    logp_N = logits_NV.log_softmax(1).gather(1, problem.target_N[:, None])[:, 0]
    loss = policy_loss(logp_N, problem.logp_old_N, problem.advantage_N)
    loss.backward()
    loss_errors = errors(problem, loss.detach())
    assert disagreement(case, loss_errors) == "" and problem.truth.d_logp_N.count_nonzero() > 10
    assert (problem.truth.d_logp_N == 0).any()  # clipped tokens exist


@pytest.mark.parametrize("mode", ["full", "forward", "ce"])
@pytest.mark.parametrize("name", [x for x in PROVIDERS if x not in (FLOOR, "torch.compile")])
def test_provider_computes_the_same_thing(name: str, mode: str):
    case = Case("tiny", mode, 48, 16, 301, "float32")
    if reason := PROVIDERS[name].unavailable_reason(case, CPU):
        pytest.skip(reason)
    try:
        step = PROVIDERS[name].load(case)
    except ImportError as error:
        pytest.skip(str(error))
    problem = fields(make_problem(case, CPU))
    answer = step(problem)
    if mode != "forward":
        answer.backward()
    assert disagreement(case, errors(problem, answer.detach())) == ""


def test_another_computation_is_noticed():
    problem = fields(make_problem(FULL, CPU))
    loss = PROVIDERS["eager"].load(FULL)(problem) * 1.01
    loss.backward()
    assert "d_weight off by" in disagreement(FULL, errors(problem, loss.detach()))
    assert disagreement(FORWARD, {"logp": float("nan")})


def test_turns_time_some_and_say_why_not_of_others():
    names = [FLOOR, OURS, "eager", "QuACK"]
    results = harness.measure(FULL, names, CPU, Plan(rounds=2))
    assert [len(results[name].seconds) for name in names[:3]] == [2, 2, 2]
    assert all(results[name].reason == "" and min(results[name].seconds) > 0 for name in names[:3])
    assert results[OURS].errors.keys() == {"loss", "d_hidden", "d_weight"}
    assert results["QuACK"].seconds is None and "cross entropy only" in results["QuACK"].reason


def test_a_provider_that_raises_is_a_row_and_not_the_end(tmp_path: Path):
    broken = Case("tiny", "full", 48, 16, 301, "float32")
    path = tmp_path / "problem.pt"
    path.write_bytes(b"no problem")
    worker = harness._Worker("eager", broken, path, CPU, Plan(rounds=1))
    assert worker.receive().split(":")[0].endswith("Error")
    worker.close()
    assert harness._failure_reason(torch.OutOfMemoryError("CUDA")) == "out of memory"
