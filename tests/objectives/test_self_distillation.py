"""SDPO and SRPO by hand: who is taught and by what, which term a response has, and how much it counts."""

from dataclasses import replace

import pytest
import torch
from test_objective import assign_token_weights, group

from vold.objectives import PRESETS
from vold.objectives.self_distillation import confidence, correct_sibling, feedback_on, without_thinking
from vold.types import Hint, Rollout, Verdict


def test_a_response_is_shown_a_correct_sibling_and_never_itself():
    assert correct_sibling([0.0, 1.0, 0.0, 1.0]) == [1, 3, 1, 1]
    assert correct_sibling([0.0, 1.0]) == [1, None]
    assert correct_sibling([0.0, 0.9]) == [None, None], "partly right is no demonstration"


def taught(preset, *rewards, **keys):
    return [[bool(s.kl_weight) for s in assign_token_weights(preset, [group(r)], **keys)] for r in rewards]


def test_routing():
    assert taught("sdpo", [0.0, 1.0, 0.0, 1.0], [0.0, 1.0], [0.0, 0.0]) == [[True] * 4, [True, False], [False] * 2]
    assert taught("srpo", [0.0, 1.0, 0.0, 1.0], [0.0, 0.0], [1.0, 1.0]) == [
        [True, False, True, False],
        [False] * 2,
        [False] * 2,
    ]


def test_with_feedback_every_failed_response_is_taught():
    """By a correct sibling, else by what was wrong with it; a right response without a sibling is not."""
    rewards = [[0.0, 1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert taught("sdpo", *rewards, feedback=True) == [[True] * 3, [True, False], [True, True]]
    assert taught("srpo", *rewards, feedback=True) == [[True, False, False], [True, False], [True, True]]
    told = "The answer is wrong."
    hints = [[s.hint for s in assign_token_weights("sdpo", [group(r)], feedback=True)] for r in rewards]
    assert hints == [
        [Hint("text", None)] * 3,
        [Hint("text", None), None],
        [Hint(None, told)] * 2,
    ]
    assert [s.hint for s in assign_token_weights("sdpo", [group([0.0, 1.0])])] == [Hint("text", None), None]


def judged_by_a_function(values, feedback):
    """A group without a gold answer: the grader's verdicts mean nothing, a term of the user's own is what is right."""
    plain = group([0.0] * len(values))
    return replace(
        plain,
        verdicts=(Verdict("broken", None, "gold"),) * len(values),
        rewards=tuple(values),
        values=tuple({"mine": value} for value in values),
        feedback=tuple(feedback),
    )


@pytest.mark.parametrize("preset", ["sdpo", "srpo"])
def test_a_term_of_ones_own_says_which_sibling_is_right(preset):
    """Never the grader, which has no answer to go by: neither for the sibling nor for what was wrong."""
    some = judged_by_a_function([0.0, 1.0, 0.5], ["too long", None, None])
    none = judged_by_a_function([0.0, 0.5, 0.0], ["too long", "no unit", None])
    keys = {"routing_term": "mine", "feedback": True}
    hints = [[s.hint for s in assign_token_weights(preset, [g], **keys)] for g in (some, none)]
    shown = Hint("text", None)
    assert hints == [[shown, None, shown], [Hint(None, "too long"), Hint(None, "no unit"), None]]
    assert [bool(s.kl_weight) for s in assign_token_weights(preset, [none], **keys)] == [True, True, False]
    silent = [s.hint for s in assign_token_weights(preset, [none], routing_term="mine")]
    assert silent == [None] * 3, "words are read with objective.feedback alone"


def test_words_of_a_function_come_before_the_graders():
    told = replace(group([0.0, 0.0]), feedback=("Carry the one.", None))
    hints = [s.hint for s in assign_token_weights("sdpo", [told], feedback=True)]
    assert hints == [Hint(None, "Carry the one."), Hint(None, "The answer is wrong.")]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict("correct", "7", "identical", gold="7"), None),
        (Verdict("wrong", "8", "number", gold="7"), "The answer is wrong. It was: 8"),
        (Verdict("wrong", None, "no_answer", gold="7"), "The response has no final answer in \\boxed{}."),
        (Verdict("wrong", None, "truncated", gold="7"), "The response was cut off before it ended."),
        (Verdict("wrong", "1=8", "chain", gold="7"), "The answer does not commit to one value. It was: 1=8"),
        (Verdict("wrong", "9" * 5000, "too_long", gold="7"), "The answer is wrong. It was: " + "9" * 200),
    ],
)
def test_feedback_is_the_graders_finding_and_never_the_gold_answer(verdict, words):
    assert feedback_on(verdict) == words
    assert words is None or verdict.gold not in words


def test_feedback_is_for_a_student_that_teaches_itself():
    with pytest.raises(ValueError, match=r"objective.feedback .* objective.preset = 'vold' does not; choose sdpo"):
        assign_token_weights("vold", [], feedback=True)


def test_thinking_is_stripped_from_the_demonstration():
    assert without_thinking("<think>a </think> b</think> \n It is \\boxed{7}. ") == "It is \\boxed{7}."
    assert without_thinking("It is 7") == "It is 7"
    mixed = group([0.0, 1.0])
    right = mixed.rollouts[1]
    mixed = type(mixed)(
        mixed.prompt,
        (mixed.rollouts[0], Rollout(right.prompt, right.response_ids, right.logp_rollout, "stop", "<think>x</think>7")),
        mixed.verdicts,
        mixed.rewards,
    )
    assert [s.hint for s in assign_token_weights("sdpo", [mixed])] == [Hint("7"), None]


def test_srpo_gives_each_response_one_term_and_all_one_token_count():
    """(sum z^G l^G + sum z^S w l^S) / sum (z^G + z^S): the failed response is taught, the other two stay with GRPO."""
    samples = assign_token_weights("srpo", [group([0.0, 1.0, 1.0], lengths=[4, 3, 1])])
    assert [s.kl_weight for s in samples] == [1 / 8, 0, 0]
    assert [s.pg_weight for s in samples] == [0, 1 / 8, 1 / 8]
    assert samples[1].advantage > 0 > samples[0].advantage, "advantages are those of the whole group"
    hopeless = assign_token_weights("srpo", [group([0.0, 0.0]), group([1.0, 0.0])])
    assert [s.kl_weight > 0 for s in hopeless] == [False, False, False, True]
    assert all(not (s.pg_weight and s.kl_weight) for s in hopeless)


def test_sdpo_has_no_policy_gradient_and_no_other_teacher():
    samples = assign_token_weights("sdpo", [group([0.0, 1.0, 1.0])])
    assert all(s.pg_weight == 0 and s.kl_weight == 1 / 6 for s in samples)
    for name in ("sdpo", "srpo"):
        assert PRESETS[name].uses_self_teacher and not PRESETS[name].needs_teacher
        full = PRESETS[name].divergence
        assert (full.name, full.alpha, full.top_k, full.ratio_cap) == ("jsd", 0.5, 100, 2.0)
        assert PRESETS[name].self_distillation.rate == 0.05 and PRESETS[name].metrics() == {"beta": 1.0}
    assert not PRESETS["vold"].uses_self_teacher


def test_confidence_weights_have_mean_one():
    entropy_n = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    weight_n = confidence(entropy_n) / confidence(entropy_n).mean()
    assert weight_n.mean() == pytest.approx(1.0) and weight_n[0] > weight_n[1] > weight_n[2]
    assert weight_n[0] / weight_n[1] == pytest.approx(1.6487212707)
