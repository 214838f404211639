"""Advantages, routing and weights, by hand-computed numbers."""

import math
import statistics

import pytest

from vold.config.schema import ObjectiveConfig
from vold.objectives import PRESETS, assign_sft_weights, build_objective
from vold.objectives.advantages import group_normalised
from vold.types import Group, Prompt, Rollout, Sample, Verdict

LONGEST = 10


def group(rewards, lengths=None, name="p"):
    prompt = Prompt(name, (1, 2, 3), "question", "7")
    lengths = lengths or [2] * len(rewards)
    rollouts = tuple(Rollout(prompt, tuple(range(n)), (-0.1,) * n, "stop", "text") for n in lengths)
    verdicts = tuple(Verdict("broken" if r is None else "correct" if r else "wrong", None, "rule") for r in rewards)
    return Group(prompt, rollouts, verdicts, tuple(rewards))


def assign_token_weights(preset, groups, **numbers):
    return build_objective(ObjectiveConfig(preset=preset, **numbers), LONGEST).assign_token_weights(groups)


def test_group_normalised_uses_the_unbiased_std():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]
    std = statistics.stdev(rewards)
    assert group_normalised(rewards) == pytest.approx([(r - 0.4) / (std + 1e-6) for r in rewards], rel=1e-12)
    assert math.isclose(std, math.sqrt(0.3))


def test_equal_rewards_give_exactly_zero_advantage():
    assert group_normalised([1.0] * 5) == [0.0] * 5
    assert group_normalised([1.0]) == [0.0]


def test_vold_distils_failures_only_with_beta_over_the_global_token_count():
    samples = assign_token_weights("vold", [group([1.0, 0.0, 0.0], lengths=[3, 5, 2])], beta=0.5)
    assert [s.kl_weight for s in samples] == pytest.approx([0.0, 0.05, 0.05])
    assert samples[0].kl_weight == 0.0
    assert [s.pg_weight for s in samples] == pytest.approx([0.1] * 3)


def test_presets_route_as_the_paper_says():
    mixed = [group([1.0, 0.0])]
    assert all(s.kl_weight == 0.0 for s in assign_token_weights("grpo", mixed, beta=0.5))
    assert all(s.kl_weight > 0.0 for s in assign_token_weights("vold-unmasked", mixed, beta=0.5))
    opd = assign_token_weights("opd", mixed, beta=0.5)
    assert all(s.kl_weight > 0.0 and s.pg_weight == 0.0 for s in opd)
    assert not PRESETS["grpo"].needs_teacher and PRESETS["vold"].needs_teacher


def test_solved_group_costs_nothing_under_vold():
    assert all(s.pg_weight == s.kl_weight == 0.0 for s in assign_token_weights("vold", [group([1.0] * 5)]))


def test_a_response_the_grader_broke_on_is_neither_in_the_baseline_nor_in_the_count():
    samples = assign_token_weights("vold", [group([1.0, None, 0.0], lengths=[4, 100, 4])])
    assert len(samples) == 2
    assert samples[0].pg_weight == pytest.approx(1 / 8)
    assert samples[0].advantage == pytest.approx(-samples[1].advantage)


def test_the_normaliser_is_shared_by_all_groups_of_the_step():
    samples = assign_token_weights(
        "vold", [group([1.0, 0.0], lengths=[2, 2]), group([1.0, 1.0], lengths=[5, 7])], beta=1.0
    )
    assert samples[0].pg_weight == pytest.approx(1 / 16)


def test_unknown_preset_names_the_choices():
    with pytest.raises(ValueError, match=r"objective.preset = 'grop' is unknown; choose one of grpo, vold"):
        build_objective(ObjectiveConfig(preset="grop"), LONGEST)


def test_likelihood_is_the_policy_gradient_with_unit_advantage():
    prompt = Prompt("p", (1,), "q")
    samples = [Sample(prompt, (1, 2, 3), 0, 0, 0), Sample(prompt, (1,), 0, 0, 0)]
    weighted = assign_sft_weights(samples)
    assert [(s.advantage, s.pg_weight, s.kl_weight) for s in weighted] == [(1.0, 0.25, 0.0)] * 2
