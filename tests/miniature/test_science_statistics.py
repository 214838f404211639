"""Intervals that hold for other seeds and other problems, p-values, Holm's correction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vold.miniature.science.statistics import crossed, holm, over_seeds, p_value, quantile


@pytest.mark.parametrize(
    ("df", "probability", "wanted"),
    [
        (2, 0.975, 4.302653),
        (7, 0.975, 2.364624),
        (9, 0.995, 3.249836),
        (30, 0.95, 1.697261),
        (math.inf, 0.975, 1.959964),
    ],
)
def test_quantiles_are_those_of_printed_tables(df, probability, wanted):
    assert quantile(probability, df) == pytest.approx(wanted, abs=1e-6)


def test_p_values_of_three_seeds_are_not_those_of_a_normal_distribution():
    assert p_value(2.0, 2) == pytest.approx(0.1835, abs=1e-4)
    assert p_value(2.0, math.inf) == pytest.approx(0.0455, abs=1e-4)


@pytest.mark.parametrize(("of_seeds", "of_problems", "of_rest"), [(0.05, 0.0, 0.5), (0.0, 0.3, 0.5), (0.05, 0.3, 0.5)])
def test_intervals_cover_the_truth_over_new_seeds_and_new_problems(of_seeds, of_problems, of_rest):
    """800 tables of 8 seeds and 100 problems whose effects are known: the 95 % interval covers in 93 to 99 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(800):
        table = (
            rng.normal(0, of_seeds, (8, 1)) + rng.normal(0, of_problems, (1, 100)) + rng.normal(0, of_rest, (8, 100))
        )
        estimate = crossed(table)
        covered += abs(estimate.mean) <= estimate.half_width
    assert 0.93 <= covered / 800 <= 0.99


def test_the_same_problems_for_all_seeds_widen_the_interval():
    rng = np.random.default_rng(1)
    table = np.repeat(rng.choice([-1.0, 0.0, 1.0], (1, 200)), 8, 0) + rng.normal(0, 0.1, (8, 200))
    both, alone = crossed(table), over_seeds(table.mean(1).tolist())
    assert both.stderr > 5 * alone.stderr
    assert both.seeds == pytest.approx(alone.stderr)


def test_equal_answers_differ_by_nothing():
    estimate = crossed(np.zeros((8, 50)))
    assert (estimate.mean, estimate.half_width, estimate.p) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("shape", [(1, 50), (8, 1)])
def test_one_seed_has_no_interval(shape):
    with pytest.raises(ValueError, match="an interval needs two of each"):
        crossed(np.zeros(shape))


def test_holm_on_its_published_steps():
    """Holm 1979: the smallest of m is multiplied by m, the next by m - 1 …, and none is below an earlier one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
