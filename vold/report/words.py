"""Plain sentences from the numbers: what they show, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .read import RunRecord
from .style import arm_of, label
from .tables import AccuracyTable, Difference, cell


@dataclass(frozen=True)
class Step:
    """One comparison of the step-by-step table: `new` against `old`, a Difference per set."""

    new: str
    old: str
    differences: Mapping[str, Difference]


def headline(table: AccuracyTable) -> list[str]:
    """One sentence per set, the last set (images) first, for it is the one the training never saw."""
    return [_sentence(table, name) for name in reversed(table.sets) if len(table.ranking(name)) > 1]


def _sentence(table: AccuracyTable, name: str) -> str:
    first, second = table.ranking(name)[:2]
    gap = table.difference(first, second, name)
    scores = (
        f"{label(first)} solves {cell(table.value(first, name), math.nan)} % of the {name} problems, "
        f"{label(second)} {cell(table.value(second, name), math.nan)} %"
    )
    if not math.isfinite(gap.stderr):
        return f"{scores}; without standard errors this cannot be called a difference."
    size = f"{100 * gap.points:.1f} ± {100 * gap.stderr:.1f} points"
    if not gap.clear:
        return f"{scores}: {size} apart, less than two standard errors, so these numbers do not separate them."
    if table.best(name) is None:
        return f"{scores}: a clear step of {size} between these two, though not over every other model."
    return f"{scores}: a clear lead of {size} over the next best."


def steps(table: AccuracyTable) -> list[Step]:
    """Each model against the one before it in the pipeline, and the last against the first RL arm's start."""
    models = table.models
    pairs = list(zip(models[1:], models, strict=False))
    if "vold" in models and "sft" in models and ("vold", "sft") not in pairs:
        pairs.append(("vold", "sft"))
    return [Step(new, old, {name: table.difference(new, old, name) for name in table.sets}) for new, old in pairs]


def step_pairs(table: AccuracyTable) -> list[tuple[str, str]]:
    """Every ordered pair that `headline`, `steps` and `best` may ask for."""
    return [(new, old) for new in table.models for old in table.models if new != old]


def difference_text(difference: Difference) -> str:
    """Signed points with their standard error: "+9.0 ± 2.1"."""
    if not math.isfinite(difference.points):
        return "–"
    if not math.isfinite(difference.stderr):
        return f"{100 * difference.points:+.1f}".replace("-", "−")
    return f"{100 * difference.points:+.1f} ± {100 * difference.stderr:.1f}".replace("-", "−")


def caveats(table: AccuracyTable, *, seeds: int = 0) -> list[str]:
    """What the table cannot say, however good it looks."""
    counts = {name: table.n[name] for name in table.sets if name in table.n}
    over = " and ".join(f"{n} {name}" for name, n in counts.items()) or "the evaluated"
    said = [f"± is one standard error over {over} problems: it says how far other problems would move the number."]
    if seeds > 1:
        said.append("How far another training seed moves it is in the table over seeds.")
    else:
        said.append("One training run per model: another seed could move every number by more than ±.")
    if any(gap.paired for gap in table.pairs.values()):
        said.append("Differences are paired: both models answered the same problems.")
    else:
        said.append("Differences treat the models as independent, which is cautious when they share problems.")
    said.append("More than two standard errors counts as clear; of twenty true ties, about one passes by luck.")
    return said


def paired_differences(
    table: AccuracyTable, evaluations: Sequence[RunRecord]
) -> dict[tuple[str, str, str], Difference]:
    """Differences over shared problems, where both runs' samples hold exactly the problems they were scored on."""
    right = {arm_of(run.name): _right_by_problem(run) for run in evaluations}
    found: dict[tuple[str, str, str], Difference] = {}
    for new, old in step_pairs(table):
        for name in table.sets:
            a, b = right.get(new, {}).get(name, {}), right.get(old, {}).get(name, {})
            if len(a) > 1 and a.keys() == b.keys() and _agrees(table, new, name, a) and _agrees(table, old, name, b):
                found[new, old, name] = _paired([a[key] - b[key] for key in a])
    return found


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a sample was graded correct, from its verdict or, without one, from its reward."""
    verdict = row.get("verdict")
    if isinstance(verdict, Mapping):
        verdict = verdict.get("outcome")
    if isinstance(verdict, str):
        return verdict == "correct"
    if isinstance(verdict, bool):
        return verdict
    reward = row.get("reward")
    return isinstance(reward, int | float) and reward > 0.5


def _right_by_problem(run: RunRecord) -> dict[str, dict[str, float]]:
    """set -> problem -> share of its responses that are right."""
    right: dict[str, dict[str, list[bool]]] = {}
    for row in run.samples:
        right.setdefault(str(row.get("set")), {}).setdefault(str(row.get("prompt_id")), []).append(is_right(row))
    return {name: {key: sum(ok) / len(ok) for key, ok in found.items()} for name, found in right.items()}


def _agrees(table: AccuracyTable, model: str, name: str, right: Mapping[str, float]) -> bool:
    """The samples reproduce the reported accuracy: they are all there."""
    return math.isclose(sum(right.values()) / len(right), table.value(model, name), abs_tol=5e-4)


def _paired(differences: Sequence[float]) -> Difference:
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return Difference(mean, math.sqrt(variance / n), paired=True)
