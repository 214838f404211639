"""Scores of an evaluation's rows: accuracy and its error, majority votes, lengths, accuracy by category."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

# The categories of MMStar and MME, divided as in VOLD's table 6. The paper does not name those of MMStar's six that
# count as perception; its two halves average to its total, so we take three of each.
PERCEPTION = {
    *("coarse perception", "fine-grained perception", "instance reasoning"),
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
}
REASONING = {
    *("logical reasoning", "math", "science & technology"),
    *("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"),
}


def summarise(rows: Sequence[dict]) -> dict:
    """Summarise the rows of one set.

    accuracy   pass@1: the mean over problems of the mean reward of their k graded responses (avg@k)
    stderr     its standard error over problems; binomial where k = 1
    majority   maj@k: share of problems whose most frequent extracted answer is correct; with its standard error
    n, k       problems with a graded response, responses to each
    broken     responses that could not be graded
    truncated  share of responses; mean_length, median_length and p95_length are in tokens
    categories, skills   the same accuracy, stderr and n by the data set's categories, and for perception and reasoning
    """
    problems = _by_problem(rows)
    lengths = sorted(row["response_tokens"] for row in rows) or [0]
    summary = _accuracy(problems)
    if summary["k"] > 1:
        votes = [_majority(problem) for problem in problems if _rewards(problem)]
        summary |= {"majority": _mean(votes), "majority_stderr": _binomial(_mean(votes), len(votes))}
    summary |= {
        "broken": sum(row["reward"] is None for row in rows),
        "truncated": _mean([row["finish_reason"] == "length" for row in rows]),
        "mean_length": _mean(lengths),
        "median_length": statistics.median(lengths),
        "p95_length": lengths[math.ceil(0.95 * len(lengths)) - 1],
    }
    names = {problem[0].get("category", "") for problem in problems} - {""}
    categories = {name: [name] for name in sorted(names)}
    skills = {"perception": names & PERCEPTION, "reasoning": names & REASONING}
    for key, groups in (("categories", categories), ("skills", skills if all(skills.values()) else {})):
        if groups:
            summary[key] = {
                group: _accuracy([problem for problem in problems if problem[0].get("category") in members])
                for group, members in groups.items()
            }
    return summary


def _by_problem(rows: Sequence[dict]) -> list[list[dict]]:
    problems: dict[str, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["prompt_id"], []).append(row)
    return list(problems.values())


def _rewards(responses: Sequence[dict]) -> list[float]:
    return [row["reward"] for row in responses if row["reward"] is not None]


def _accuracy(problems: Sequence[Sequence[dict]]) -> dict:
    """Accuracy over the problems with a graded response."""
    means = [_mean(_rewards(problem)) for problem in problems if _rewards(problem)]
    accuracy, k = _mean(means), max(map(len, problems), default=1)
    over_problems = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    stderr = over_problems if k > 1 else _binomial(accuracy, len(means))
    return {"accuracy": accuracy, "stderr": stderr, "n": len(means), "k": k}


def _majority(responses: Sequence[dict]) -> float:
    """The reward of the most frequent extracted answer, the first of equally frequent ones; 0 without any answer."""
    answers = [row["extracted"] for row in responses if row["extracted"] is not None and row["reward"] is not None]
    if not answers:
        return 0.0
    (winner, _), *_ = Counter(answers).most_common(1)
    return next(row["reward"] for row in responses if row["extracted"] == winner and row["reward"] is not None)


def _binomial(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / max(n, 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
