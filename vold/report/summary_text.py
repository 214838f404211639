"""Sentences about an accuracy table: what its numbers show, and what they cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, permutations
from statistics import fmean

from .read import RunRecord, group_by, is_correct, problem_key
from .style import arm_of, label
from .tables import AccuracyTable, Difference, Mean, percent


def lead_sentences(table: AccuracyTable) -> list[str]:
    """One sentence per set, the last set (images) first: training never saw it."""
    return [_lead_sentence(table, name) for name in reversed(table.sets) if len(table.ranking(name)) > 1]


def _lead_sentence(table: AccuracyTable, name: str) -> str:
    first, second = table.ranking(name)[:2]
    gap = table.difference(first, second, name)
    scores = (
        f"{label(first)} solves {percent(table.value(first, name))} % of the {name} problems, "
        f"{label(second)} {percent(table.value(second, name))} %"
    )
    if not math.isfinite(gap.stderr):
        return f"{scores}; without standard errors this cannot be called a difference."
    size = f"{100 * gap.points:.1f} ± {100 * gap.stderr:.1f} points"
    if not gap.clear:
        return f"{scores}: {size} apart, less than two standard errors, so these numbers do not separate them."
    if table.best(name) is None:
        return f"{scores}: a clear step of {size} between these two, though not over every other model."
    return f"{scores}: a clear lead of {size} over the next best."


def stage_differences(table: AccuracyTable) -> dict[tuple[str, str], dict[str, Difference]]:
    """(new, old) -> set -> difference: each model against the one before it in the pipeline, and VOLD against SFT."""
    pairs = [(new, old) for old, new in pairwise(table.models)]
    if {"vold", "sft"} <= set(table.models) and ("vold", "sft") not in pairs:
        pairs.append(("vold", "sft"))
    return {(new, old): {name: table.difference(new, old, name) for name in table.sets} for new, old in pairs}


def limitations(table: AccuracyTable, *, seeds: int = 0) -> list[str]:
    """Sentences on what the table cannot tell, however good it looks."""
    counts = [f"{table.n[name]} {name}" for name in table.sets if name in table.n]
    problems = " and ".join(counts) or "the evaluated"
    comparing = (
        "Differences are paired: both models answered the same problems."
        if any(gap.paired for gap in table.pairs.values())
        else "Differences treat the models as independent, which is cautious when they share problems.",
        "More than two standard errors counts as clear; of twenty true ties, about one passes by luck.",
    )
    return [
        f"± is one standard error over {problems} problems: the size of the change that other problems would bring.",
        "The change that another training seed brings is in the table over seeds."
        if seeds > 1
        else "One training run per model: another seed could move every number by more than ±.",
        *(comparing if len(table.models) > 1 else ()),
    ]


def paired_differences(
    table: AccuracyTable, evaluations: Sequence[RunRecord]
) -> dict[tuple[str, str, str], Difference]:
    """(new, old, set) -> difference over shared problems, where both runs' samples are those they were scored on."""
    shares = {arm_of(run.name): _correct_shares(run) for run in evaluations}
    pairs: dict[tuple[str, str, str], Difference] = {}
    for name in table.sets:
        complete = {}
        for model in table.models:
            problems = {key: share for key, share in shares.get(model, {}).items() if key[0] == name}
            # samples that do not reproduce the reported accuracy are not all there
            if len(problems) > 1 and math.isclose(fmean(problems.values()), table.value(model, name), abs_tol=5e-4):
                complete[model] = problems
        for new, old in permutations(complete, 2):
            if complete[new].keys() == complete[old].keys():
                mean = Mean(tuple(share - complete[old][key] for key, share in complete[new].items()))
                pairs[new, old, name] = Difference(mean.value, mean.stderr, paired=True)
    return pairs


def _correct_shares(run: RunRecord) -> dict[tuple[str, str], float]:
    """(set, problem) -> share of its responses that are correct."""
    return {key: fmean(map(is_correct, rows)) for key, rows in group_by(run.samples, problem_key).items()}
