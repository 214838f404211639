"""Repetition among an iteration's questions and of earlier iterations: R-Diverse's two illusions in numbers.

local illusion     the questions of one iteration differ, and return in the next iterations: `recycled` is high
surface illusion   they differ by their words, not by the code that solves them: `clusters_words` is high and
                   `clusters_vectors` is not (where the vectors are of code)

Shape letters: Q questions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import islice

import numpy as np
import torch

from vold.selfplay.bank import Bank
from vold.selfplay.penalties import bleu_distances, clusters, cosine_distances

MAX_CLUSTERED = 100  # questions of an iteration that are clustered: the first, and their order is random

Words = Callable[[str], Sequence[Hashable]]
"""Splits a question into the words of BLEU."""


def diversity(bank: Bank, iteration: int, words: Words, *, threshold: float) -> dict[str, float]:
    """Shares of an iteration's questions in the bank.

    distinct         different texts
    seen_before      with a text of an earlier iteration
    clusters_words   clusters by BLEU distance below `threshold`, per clustered question
    and where there are embeddings
    clusters_vectors    the same by cosine distance
    nearest_earlier     mean over questions of the greatest cosine with an earlier iteration's
    recycled            with a cosine above 1 - threshold with an earlier one

    The last two and `seen_before` are absent in the first iteration.
    """
    texts = [question.question for question in bank.read([iteration])]
    earlier = [number for number in bank.iterations() if number < iteration]
    first = texts[:MAX_CLUSTERED]
    shares = {
        "distinct": len(set(texts)) / len(texts),
        "clusters_words": _clusters_per_question(bleu_distances([words(text) for text in first]), threshold),
    }
    if earlier:
        repeated = set(texts) & {question.question for question in bank.read(earlier)}
        shares["seen_before"] = sum(text in repeated for text in texts) / len(texts)
    vectors_QE = np.concatenate(list(bank.embeddings([iteration])))
    if vectors_QE.shape[1]:
        shares["clusters_vectors"] = _clusters_per_question(cosine_distances(vectors_QE[:MAX_CLUSTERED]), threshold)
        if earlier:
            nearest_Q, _ = bank.similarity(vectors_QE, earlier)
            shares["nearest_earlier"] = float(nearest_Q.mean())
            shares["recycled"] = float((nearest_Q > 1.0 - threshold).mean())
    return shares


def _clusters_per_question(distance_QQ: np.ndarray, threshold: float) -> float:
    return (int(clusters(distance_QQ, threshold=threshold).max()) + 1) / len(distance_QQ)


def project_to_plane(vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Points [Q, 2] of each set of rows [Q, E]: the first two principal components of all sets together."""
    rows = torch.from_numpy(np.concatenate(list(vectors)).astype(np.float64))
    centred = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    # a component's sign is arbitrary: its largest coefficient is made positive, so that a map is drawn the same twice
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    points = iter((centred @ (directions * signs).T).numpy())
    return [np.stack(list(islice(points, len(part)))) if len(part) else np.zeros((0, 2)) for part in vectors]
