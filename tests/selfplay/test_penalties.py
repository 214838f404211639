"""R-Zero's and R-Diverse's numbers, computed by hand, on both sides of every threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vold.config.schema import MemoryConfig
from vold.selfplay.penalties import (
    bleu,
    bleu_distances,
    challenger_reward,
    cluster_sizes,
    clusters,
    cosine_distances,
    memory_penalty,
    uncertainty,
)


@pytest.mark.parametrize(("agreement", "value"), [(0.5, 1.0), (0.0, 0.0), (1.0, 0.0), (0.3, 0.6), (0.7, 0.6)])
def test_uncertainty(agreement, value):
    assert uncertainty(agreement) == pytest.approx(value)


def test_reward_never_falls_below_nothing():
    assert challenger_reward(0.7, 0.25) == pytest.approx(0.35)
    assert challenger_reward(0.7, 0.6) == pytest.approx(0.0)
    assert challenger_reward(0.9, 0.5) == 0.0


@pytest.mark.parametrize(
    ("nearest", "mean", "penalty"),
    [
        (0.5, 0.25, 0.0),  # at both thresholds
        (0.4, -0.3, 0.0),  # below both
        (0.7, 0.25, 0.1),  # .5 * .2
        (0.5, 0.45, 0.1),  # .5 * .2
        (1.0, 0.65, 0.45),  # .5 * .5 + .5 * .4
    ],
)
def test_memory_penalty_at_its_thresholds(nearest, mean, penalty):
    assert memory_penalty(nearest, mean, MemoryConfig()) == pytest.approx(penalty)


def test_gamma_shares_the_memory_penalty():
    assert memory_penalty(0.9, 0.45, MemoryConfig(gamma=0.75)) == pytest.approx(0.75 * 0.4 + 0.25 * 0.2)


def test_bleu_by_hand():
    """candidate a b c d, reference a b c x: 3/4, 2/3, 1/2 and no four-gram, counted as .1 of 1."""
    wanted = (3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** 0.25
    assert bleu("abcd", "abcx") == pytest.approx(wanted)
    assert bleu("abcd", "abcd") == pytest.approx(1.0)
    assert bleu("abcd", "wxyz") == 0.0


def test_a_short_candidate_pays_for_its_brevity():
    """a b c d of a b c d e f: every n-gram is there, exp(1 - 6/4) remains. The other way round clipped counts do."""
    assert bleu("abcd", "abcdef") == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu("abcdef", "abcd") == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    distance = bleu_distances(["abcd", "abcdef"])
    both = math.exp(-0.5) + (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert distance == pytest.approx(np.array([[0, 1 - both / 2], [1 - both / 2, 0]]))


def test_counts_are_clipped():
    """a a a a of a b: one of four unigrams; no longer n-gram matches."""
    assert bleu("aaaa", "ab") == pytest.approx((1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25)


def test_equal_short_questions_have_no_distance():
    """BLEU of a two-token question with itself is below 1, for it has no four-gram."""
    assert bleu("ab", "ab") < 1.0
    assert bleu_distances(["ab", "ab"])[0, 1] == 0.0


def test_clusters_are_joined_below_the_threshold_only():
    distance = np.array([[0.0, 0.49, 0.9], [0.49, 0.0, 0.5], [0.9, 0.5, 0.0]])
    assert clusters(distance, threshold=0.5).tolist() == [0, 0, 1]
    assert clusters(distance, threshold=0.49).tolist() == [0, 1, 2], "at the threshold nothing is joined"
    assert cluster_sizes(distance, threshold=0.5).tolist() == [2, 2, 1]


def test_linkage_is_the_average_over_members():
    """0, 1 and 2 join (.1, then .2). The question 3 is .45, .45 and .54 from them: .48 on average, so it joins; with
    the distance to the farthest it would not."""
    distance = np.zeros((4, 4))
    for i, j, value in [(0, 1, 0.1), (0, 2, 0.2), (1, 2, 0.2), (0, 3, 0.45), (1, 3, 0.45), (2, 3, 0.54)]:
        distance[i, j] = distance[j, i] = value
    assert clusters(distance, threshold=0.5).tolist() == [0, 0, 0, 0]
    distance[2, 3] = distance[3, 2] = 0.61  # the average is .503 now; the nearest is still .45
    assert clusters(distance, threshold=0.5).tolist() == [0, 0, 0, 1]


def test_cluster_numbers_do_not_depend_on_what_is_joined_first():
    distance = cosine_distances(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    assert clusters(distance, threshold=0.5).tolist() == [0, 1, 1, 0]
    assert cluster_sizes(distance, threshold=0.5).tolist() == [2, 2, 2, 2]
    assert cluster_sizes(np.zeros((0, 0)), threshold=0.5).tolist() == []
