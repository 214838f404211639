"""The challenger's reward for a question: R-Zero's, and R-Diverse's memory-augmented penalty (MAP).

    reward = max(0, 1 - 2 |p - 1/2| - weight * |cluster| / B - memory_weight * P)          0 where the format is bad

p: share of the solver's answers that agree with their majority; cluster: the similar questions among the B responses of
the same step; P: similarity of the question to the memory bank (R-Diverse alone).

Shape letters: Q questions. Plain numbers and numpy, no models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np

from vold.config.schema import MemoryConfig

MAX_ORDER = 4  # BLEU's longest n-gram
SMOOTHING = 0.1  # matches of an order without any: method 1 of Chen and Cherry (2014), as in R-Zero


def uncertainty(agreement: float) -> float:
    """1 - 2 |p - 1/2| (R-Zero): 1 where half of the solver's answers agree, 0 where all or none do."""
    return 1.0 - 2.0 * abs(agreement - 0.5)


def challenger_reward(agreement: float, penalty: float) -> float:
    """max(0, uncertainty - penalty), where `penalty` is already weighted."""
    return max(0.0, uncertainty(agreement) - penalty)


def memory_penalty(nearest: float, mean: float, config: MemoryConfig) -> float:
    """P = gamma [max cos - nearest_allowed]+ + (1 - gamma) [mean cos - mean_allowed]+ (R-Diverse, MAP).

    nearest, mean: cosines of the question with the questions in the bank."""
    beyond_nearest = max(0.0, nearest - config.nearest_allowed)
    beyond_mean = max(0.0, mean - config.mean_allowed)
    return config.gamma * beyond_nearest + (1.0 - config.gamma) * beyond_mean


# -- similar questions of a step ------------------------------------------------------------------------------------


def bleu_distances(questions: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """1 - BLEU-4 of each pair of token sequences, float64 [Q, Q]; 0 between equal ones. BLEU is not symmetric: the
    mean of both directions is taken, so that clusters do not depend on the order (R-Zero takes one direction)."""
    ngrams = [_ngrams(question) for question in questions]
    distance_QQ = np.zeros((len(questions), len(questions)))
    for i, j in combinations(range(len(questions)), 2):
        if tuple(questions[i]) != tuple(questions[j]):
            both = bleu(questions[i], questions[j], ngrams[i], ngrams[j])
            both += bleu(questions[j], questions[i], ngrams[j], ngrams[i])
            distance_QQ[i, j] = distance_QQ[j, i] = 1.0 - both / 2
    return distance_QQ


def bleu(
    candidate: Sequence[Hashable],
    reference: Sequence[Hashable],
    candidate_ngrams: Sequence[Counter] | None = None,
    reference_ngrams: Sequence[Counter] | None = None,
) -> float:
    """Sentence BLEU-4 with one reference, uniform weights, brevity penalty, and SMOOTHING for an order without a
    match; 0 where no token matches."""
    candidate_ngrams = candidate_ngrams or _ngrams(candidate)
    reference_ngrams = reference_ngrams or _ngrams(reference)
    total = 0.0
    for order, (ours, theirs) in enumerate(zip(candidate_ngrams, reference_ngrams, strict=True), start=1):
        matches = sum(min(count, theirs[ngram]) for ngram, count in ours.items() if ngram in theirs)
        if order == 1 and not matches:
            return 0.0
        total += math.log((matches or SMOOTHING) / max(len(candidate) - order + 1, 1))
    brevity = min(0.0, 1.0 - len(reference) / len(candidate))
    return math.exp(brevity + total / MAX_ORDER)


def _ngrams(tokens: Sequence[Hashable]) -> list[Counter]:
    """Counts of the n-grams of each order from 1 to MAX_ORDER."""
    tokens = tuple(tokens)
    return [Counter(tokens[k : k + n] for k in range(len(tokens) - n + 1)) for n in range(1, MAX_ORDER + 1)]


def cosine_distances(embeddings_QE: np.ndarray) -> np.ndarray:
    """1 - cosine of each pair of unit rows, [Q, Q] (R-Diverse, SAM)."""
    return np.clip(1.0 - embeddings_QE @ embeddings_QE.T, 0.0, None)


def clusters(distance_QQ: np.ndarray, *, threshold: float) -> np.ndarray:
    """The cluster of each question, int64 [Q], numbered from 0 by first appearance: average linkage, the two nearest
    clusters joined as long as they are less than `threshold` apart (as scikit-learn's AgglomerativeClustering does)."""
    size = len(distance_QQ)
    between = np.array(distance_QQ, dtype=float)
    np.fill_diagonal(between, np.inf)
    counts, member = np.ones(size), np.arange(size)
    while size > 1:
        i, j = divmod(int(between.argmin()), size)
        if between[i, j] >= threshold:
            break
        joined = (counts[i] * between[i] + counts[j] * between[j]) / (counts[i] + counts[j])
        between[i], between[:, i] = joined, joined
        between[j], between[:, j], between[i, i] = np.inf, np.inf, np.inf
        counts[i] += counts[j]
        member[member == j] = i
    number = {name: index for index, name in enumerate(dict.fromkeys(member.tolist()))}
    return np.array([number[name] for name in member.tolist()], dtype=np.int64)


def cluster_sizes(distance_QQ: np.ndarray, *, threshold: float) -> np.ndarray:
    """Size of each question's cluster, int64 [Q], itself included."""
    cluster_Q = clusters(distance_QQ, threshold=threshold)
    return np.bincount(cluster_Q)[cluster_Q] if len(cluster_Q) else cluster_Q
