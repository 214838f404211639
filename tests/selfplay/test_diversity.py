"""The numbers that show both illusions, by hand; the map; the picture draws what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from vold.selfplay.bank import Bank, BankedQuestion
from vold.selfplay.diversity import diversity, project_to_plane
from vold.selfplay.figures import SelfplayRecord, diversity_figure

X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def bank_of(directory, *iterations) -> Bank:
    bank = Bank(directory)
    for number, questions in enumerate(iterations, start=1):
        rows = [BankedQuestion(number, "", 0, text, "4", 0.5, row) for text, row in questions]
        bank.append(number, rows)
    return bank


def test_surface_illusion_is_many_words_and_little_code(tmp_path):
    """Four questions without a word in common, of which three are solved alike."""
    bank = bank_of(tmp_path, [("abcd", X), ("efgh", X), ("ijkl", X), ("mnop", Y)])
    found = diversity(bank, 1, list, threshold=0.5)
    assert found == {"distinct": 1.0, "clusters_words": 1.0, "clusters_vectors": 0.5}


def test_local_illusion_is_what_comes_back(tmp_path):
    """The second iteration's questions differ from each other, and half of them are those of the first again."""
    near = (0.6, 0.0, 0.8)  # of X and Z, cosine .6 and .8
    bank = bank_of(tmp_path, [("abcd", X), ("efgh", Y)], [("abcd", X), ("wxyz", Z)], [("stuv", near), ("abcd", X)])
    found = diversity(bank, 2, list, threshold=0.5)
    assert found["clusters_words"] == found["clusters_vectors"] == found["distinct"] == 1.0
    assert found["seen_before"] == 0.5 and found["recycled"] == 0.5
    assert found["nearest_earlier"] == pytest.approx((1.0 + 0.0) / 2)
    third = diversity(bank, 3, list, threshold=0.1)
    assert third["nearest_earlier"] == pytest.approx((0.8 + 1.0) / 2), "of all earlier iterations"
    assert third["recycled"] == 0.5 and diversity(bank, 3, list, threshold=0.3)["recycled"] == 1.0
    assert "recycled" not in diversity(bank, 1, list, threshold=0.5)


def test_without_embeddings_only_words_are_counted(tmp_path):
    bank = bank_of(tmp_path, [("abcd", ()), ("abcd", ()), ("efgh", ())])
    assert diversity(bank, 1, list, threshold=0.5) == {
        "distinct": pytest.approx(2 / 3),
        "clusters_words": pytest.approx(2 / 3),
    }


def test_map_keeps_the_plane_that_varies_most():
    """Points of a plane in five dimensions come back with their distances, whatever set they are in."""
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((30, 2)) * [3.0, 1.0]
    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    rows = (flat @ turn[:2] + 7.0).astype(np.float32)
    first, none, second = project_to_plane([rows[:10], rows[:0], rows[10:]])
    assert len(first) == 10 and none.shape == (0, 2)
    found = np.concatenate([first, second])
    between = np.linalg.norm(found[:, None] - found[None], axis=-1)
    assert between == pytest.approx(np.linalg.norm(flat[:, None] - flat[None], axis=-1), abs=1e-4)
    assert found[:, 0].std() > found[:, 1].std()


def test_the_figure_shows_each_arm_and_number():
    rows = [{"step": n, "accuracy_text": 0.5 + n / 10, "recycled": 0.2} for n in range(3)]
    dots = [np.random.default_rng(n).standard_normal((5, 2)) for n in range(2)]
    arms = {"R-Zero": [SelfplayRecord(rows, dots), SelfplayRecord(rows)], "R-Diverse": [SelfplayRecord(rows, dots)]}
    drawn = diversity_figure(arms).decode()
    for words in ("R-Zero", "R-Diverse", "Held-out accuracy", "Recycled", "Map of questions, R-Zero", "iteration"):
        assert words in drawn
    assert "Clusters by code" not in drawn, "nobody logged it"
    assert diversity_figure(arms, fmt="png").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="logged any of accuracy_text"):
        diversity_figure({"R-Zero": [SelfplayRecord([{"step": 1}])]})
