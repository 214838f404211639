"""What is graded: a response to a problem, and everything the problem says about its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vold.grading.choices import choose
from vold.grading.equality import Undecided, decide
from vold.grading.extract import extract_answer
from vold.grading.scalars import Decision

if TYPE_CHECKING:
    from vold.types import Rollout  # imports torch, which grading workers must not


class Item(NamedTuple):
    """truncated: the response was cut off; choices: the texts of options A, B, …, where gold is a letter; problem: the
    text that was asked, "" where it is unknown."""

    response: str
    gold: str
    truncated: bool = False
    choices: tuple[str, ...] = ()
    problem: str = ""

    @classmethod
    def of(cls, rollout: Rollout) -> Item:
        """The item of a sampled response."""
        prompt = rollout.prompt
        return cls(rollout.text, prompt.gold, rollout.finish_reason == "length", prompt.choices, prompt.text)


def extracted(item: Item) -> str | None:
    """The answer that is compared: of a problem with options the choice, of any other the content of the box."""
    if item.truncated:
        return None
    if not item.choices:
        return extract_answer(item.response)
    chosen = choose(item.response, item.choices)
    return chosen.answer if chosen else extract_answer(item.response)


def judge(item: Item) -> Decision | Undecided:
    """The verdict on an item that has an answer, or the comparison that is left to algebra. One judge for training and
    evaluation."""
    if not item.choices:
        return decide(extracted(item) or "", item.gold, item.problem)
    chosen = choose(item.response, item.choices)
    return chosen.against(item.gold) if chosen else (False, "choice")
