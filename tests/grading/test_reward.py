"""Rewards: accuracy, format, and what neither counts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vold.config.schema import ObjectiveConfig, RewardConfig
from vold.grading import reward
from vold.grading.reward import well_formed
from vold.objectives import build_objective
from vold.types import Group, Prompt, Rollout, Verdict

PROMPT = Prompt("p", (1,), "")
EASY_R1 = RewardConfig(accuracy=0.9, format=0.1)
FORMED, BARE = "<think>2+2</think>So \\boxed{4}.", "It is \\boxed{4}."


def rollout(text, finish="stop"):
    return Rollout(PROMPT, (2, 3), (-1.0, -1.0), finish, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FORMED, True),
        ("\n<think>\n2+2\n</think>\n\n\\boxed{4}\n", True),
        (BARE, False),
        ("Well: " + FORMED, False),
        ("<think>2+2 \\boxed{4}</think>4", False),
        ("<think>a</think><think>b</think>\\boxed{4}", False),
        ("<think>2+2 \\boxed{4}", False),
        ("<think>2+2</think>\\boxed{4", False),
        ("", False),
    ],
)
def test_form(text, expected):
    assert well_formed(text) is expected


def test_rewards_of_the_three_methods():
    right, wrong, broken = (Verdict(outcome, None, "") for outcome in ("correct", "wrong", "broken"))
    expected = {(1.0, 0.0): (1, 1, 0, 0), (0.9, 0.1): (1, 0.9, 0.1, 0), (0.5, 0.5): (1, 0.5, 0.5, 0)}
    for (accuracy, form), values in expected.items():
        config = RewardConfig(accuracy=accuracy, format=form)
        found = [reward(rollout(text), verdict, config) for verdict in (right, wrong) for text in (FORMED, BARE)]
        assert found == pytest.approx(list(values))
        assert reward(rollout(FORMED), broken, config) is None
        assert reward(rollout(FORMED, "length"), wrong, config) == 0.0


def test_a_wrong_answer_failed_however_well_it_is_written():
    verdicts = tuple(Verdict(outcome, None, "") for outcome in ("correct", "wrong", "wrong"))
    rollouts = (rollout(BARE), rollout(FORMED), rollout(BARE))
    rewards = tuple(reward(r, v, EASY_R1) for r, v in zip(rollouts, verdicts, strict=True))
    samples = build_objective(ObjectiveConfig(beta=0.6), 40).assign_token_weights(
        [Group(PROMPT, rollouts, verdicts, rewards)]
    )
    assert [sample.kl_weight for sample in samples] == pytest.approx([0.0, 0.1, 0.1]), "beta / 6 tokens"
    assert samples[0].advantage > samples[1].advantage > samples[2].advantage


@pytest.mark.parametrize("numbers", [dict(accuracy=1.0, format=0.1), dict(accuracy=0.0, format=1.0), dict(format=0.5)])
def test_shares_that_do_not_add_up_are_a_mistake(numbers):
    with pytest.raises(ValidationError, match=r"must add up to 1, the first above 0"):
        RewardConfig(**numbers)
