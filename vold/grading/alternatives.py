"""Several right answers to one problem: a response is right where it gives any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vold.grading.item import Item

if TYPE_CHECKING:  # records import torch, which workers must not
    from vold.types import Rollout, Verdict


def grade_answers(
    grade: Callable[[Sequence[Item]], list[Verdict]],
    rollouts: Sequence[Rollout],
) -> list[Verdict]:
    """The verdict on each rollout: by the first of its prompt's right answers that accepts it, else by the first that
    could be graded. grade: verdicts in order; called once."""
    golds = [(rollout.prompt.gold, *rollout.prompt.other_golds) for rollout in rollouts]
    items = [
        Item.of(rollout)._replace(gold=gold)
        for rollout, of_prompt in zip(rollouts, golds, strict=True)
        for gold in of_prompt
    ]
    verdicts = iter(grade(items))
    return [_best([next(verdicts) for _ in of_prompt]) for of_prompt in golds]


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return min(verdicts, key=lambda verdict: ("correct", "wrong", "broken").index(verdict.outcome))
