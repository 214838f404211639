"""What an evaluation's rows amount to: accuracy and its error, majority votes, lengths, accuracy by category."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

# What MMStar and MME call their kinds of problem, divided as in VOLD's table 6. It does not say which of MMStar's six
# count as perception; its halves average to its total, so there are three of each (our reading).
PERCEPTION = {
    *("coarse perception", "fine-grained perception", "instance reasoning"),
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
}
REASONING = {
    *("logical reasoning", "math", "science & technology"),
    *("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"),
}


def summarise(rows: Sequence[dict]) -> dict:
    """accuracy  pass@1: the mean over problems of the mean reward of their k responses (avg@k), by what could be judged
    stderr    its standard error over problems; binomial where k = 1
    majority  maj@k: share of problems whose commonest answer is right, of answers that read the same; with its error
    n, k      problems that could be judged, responses to each
    broken    responses that could not; truncated: share of responses; mean, median and 95th percentile of their tokens
    categories, skills   the same accuracy, stderr and n by the data set's own kinds, and for perception and reasoning
    """
    problems = _by_problem(rows)
    lengths = sorted(row["response_tokens"] for row in rows) or [0]
    found = _accuracy(problems)
    if found["k"] > 1:
        votes = [_majority(one) for one in problems if _judged(one)]
        found |= {"majority": _mean(votes), "majority_stderr": _binomial(_mean(votes), len(votes))}
    found |= {
        "broken": sum(row["reward"] is None for row in rows),
        "truncated": _mean([row["finish_reason"] == "length" for row in rows]),
        "mean_length": _mean(lengths),
        "median_length": statistics.median(lengths),
        "p95_length": lengths[math.ceil(0.95 * len(lengths)) - 1],
    }
    kinds = {one[0].get("category", "") for one in problems} - {""}
    groups = {kind: [kind] for kind in sorted(kinds)}
    skills = {"perception": kinds & PERCEPTION, "reasoning": kinds & REASONING}
    for name, table in (("categories", groups), ("skills", skills if all(skills.values()) else {})):
        if table:
            found[name] = {
                group: _accuracy([one for one in problems if one[0].get("category") in members])
                for group, members in table.items()
            }
    return found


def _by_problem(rows: Sequence[dict]) -> list[list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row)
    return list(found.values())


def _judged(responses: Sequence[dict]) -> list[float]:
    return [row["reward"] for row in responses if row["reward"] is not None]


def _accuracy(problems: Sequence[Sequence[dict]]) -> dict:
    """Problems of which no response could be judged do not count."""
    means = [_mean(_judged(one)) for one in problems if _judged(one)]
    accuracy, k = _mean(means), max(map(len, problems), default=1)
    over_problems = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    stderr = over_problems if k > 1 else _binomial(accuracy, len(means))
    return {"accuracy": accuracy, "stderr": stderr, "n": len(means), "k": k}


def _majority(responses: Sequence[dict]) -> float:
    """The reward of the answer that most responses gave; of a tie, the one given first. No answer is no vote."""
    answers = [row["extracted"] for row in responses if row["extracted"] is not None and row["reward"] is not None]
    if not answers:
        return 0.0
    (winner, _), *_ = Counter(answers).most_common(1)
    return next(row["reward"] for row in responses if row["extracted"] == winner and row["reward"] is not None)


def _binomial(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / max(n, 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
