"""Each method's formula by hand-computed numbers."""

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_objective import LONGEST, assign_token_weights, group

from vold.config.schema import ObjectiveConfig
from vold.objectives import PRESETS, Objective, build_objective, ratios, routing, split_minibatches
from vold.objectives.advantages import group_normalised, mean_centred, smoothed
from vold.objectives.normalisers import constant, sequences, tokens
from vold.objectives.rewards import OverlongPenalty
from vold.objectives.schedules import Linear, TargetKL

ROOT = Path(__file__).parents[2]


def build(**keys):
    return build_objective(ObjectiveConfig(**keys), LONGEST)


def test_dr_grpo_divides_by_neither_std_nor_length():
    assert mean_centred([1.0, 0.0, 0.0, 1.0, 0.0]) == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4], rel=1e-15)
    assert mean_centred([0.3, 0.3]) == [0.0, 0.0]
    samples = assign_token_weights("dr-grpo", [group([1.0, 0.0], lengths=[2, 9])])
    assert [s.advantage for s in samples] == [0.5, -0.5]
    assert [s.pg_weight for s in samples] == pytest.approx([1 / (2 * LONGEST)] * 2, rel=1e-15)


def test_normalisers():
    lengths = [2, 6]
    assert tokens(lengths, 10) == pytest.approx([1 / 8, 1 / 8])
    assert sequences(lengths, 10) == pytest.approx([1 / 4, 1 / 12])
    assert constant(lengths, 10) == pytest.approx([1 / 20, 1 / 20])
    assert tokens([], 10) == sequences([], 10) == constant([], 10) == []


def test_gspo_weighs_a_response_by_the_mean_of_its_tokens():
    """Sum over tokens of weight x (the same ratio) x A is the mean over responses: G responses, |y| tokens each."""
    samples = assign_token_weights("gspo", [group([1.0, 0.0], lengths=[2, 8])])
    assert [s.pg_weight * len(s.response_ids) for s in samples] == pytest.approx([0.5, 0.5], rel=1e-15)
    assert PRESETS["gspo"].ratio.couples_tokens and PRESETS["vold-gspo"].ratio.couples_tokens
    assert (PRESETS["gspo"].clip_eps_low, PRESETS["gspo"].clip_eps_high) == (3e-4, 4e-4)


@pytest.mark.parametrize(
    ("q", "low", "high"),
    [
        (1.0, 0.5 + 0.5 * math.sqrt(0.36), 0.5 + 0.5 * math.sqrt(1.8)),  # .8 and 1.1708
        (0.8, 0.5 + 0.5 * math.sqrt(0.2), 0.5 + 0.5 * math.sqrt(2.0)),
        (0.64, 0.5, 0.5 + 0.5 * math.sqrt(2.25)),  # 4 clip_eps_low / q = 1: from here down the lower bound is a half
        (1e-6, 0.5, 0.5 + 0.5 * math.sqrt(800001.0)),  # 447.7: rare tokens are all but free
        (0.0, 0.5, math.inf),
    ],
)
def test_dcpo_bounds(q, low, high):
    objective = PRESETS["dcpo"]
    logp_N = torch.tensor([q], dtype=torch.float64).log()
    found = objective.ratio.bounds(logp_N, objective.clip_eps_low, objective.clip_eps_high)
    assert [float(bound) for bound in found] == pytest.approx([low, high], rel=1e-9)


def test_dcpo_bounds_hold_the_change_of_probability_within_its_variance():
    """Where they come from: |ratio - 1| ratio q <= clip, solved for the ratio."""
    logp_N = torch.linspace(-8, 0, 20, dtype=torch.float64)
    low_N, high_N = ratios.adaptive_bounds(logp_N, 0.16, 0.2)
    q_N, free_N = logp_N.exp(), low_N == 0.5
    assert torch.allclose((high_N - 1) * high_N * q_N, torch.full_like(q_N, 0.2))
    assert torch.allclose(((1 - low_N) * low_N * q_N)[~free_N], torch.full_like(q_N[~free_N], 0.16))
    assert free_N.any() and not free_N.all()


def test_dcpo_smooths_advantages_over_the_steps_of_a_prompt():
    """By hand, unbiased std. Step 3 after two of only failures: this step's mean is 1/2 and std 1/sqrt 2, over all six
    rewards 1/6 and 1/sqrt 6; the right response is nearer to 0 with weight 2/3 on this step, the wrong one with 1/3."""
    assert smoothed([1.0, 0.0, 0.0]) == pytest.approx(group_normalised([1.0, 0.0, 0.0]), rel=1e-15)
    new, right, wrong = math.sqrt(0.5), (5 / 6) * math.sqrt(6), -(1 / 6) * math.sqrt(6)
    expected = [2 / 3 * new + 1 / 3 * right, -1 / 3 * new + 2 / 3 * wrong]  # 1.1518 and -.5079
    assert smoothed([1.0, 0.0], [(0.0, 0.0), (0.0, 0.0)]) == pytest.approx(expected, rel=1e-5)


def test_dcpo_learns_from_equal_rewards_by_those_of_earlier_steps():
    """1/i A_total: over 1, 0, 1, 1 the mean is 3/4, the std 1/2; this is step 2. Always the same teaches nothing."""
    assert smoothed([1.0, 1.0], [(1.0, 0.0)]) == pytest.approx([0.25, 0.25], rel=1e-5)
    assert smoothed([1.0, 1.0], [(1.0, 1.0)]) == [0.0, 0.0] == smoothed([1.0, 1.0])
    solved = replace(group([1.0, 1.0]), earlier=((1.0, 0.0),))
    assert [s.advantage for s in assign_token_weights("dcpo", [solved])] == pytest.approx([0.25, 0.25], rel=1e-5)
    assert build(preset="dcpo").has_gradient(solved) and not build(preset="grpo").has_gradient(solved)


def test_overlong_penalty():
    """DAPO Eq. 13 with its own numbers: L_max 20480, L_cache 4096; half of them, as our rewards span half the range."""
    penalty = OverlongPenalty()
    lengths = [0, 16384, 16385, 18432, 20479, 20480]
    assert [penalty(n, 20480) for n in lengths] == pytest.approx([0, 0, 0.5 / 4096, 0.25, 0.5 * 4095 / 4096, 0.5])


def test_the_overlong_penalty_moves_advantages_and_leaves_routing_alone():
    long, short = assign_token_weights("dapo", [group([1.0, 1.0], lengths=[10, 8])])  # penalties .5 and 0
    assert long.advantage == pytest.approx(-0.25 / (statistics.stdev([0.5, 1.0]) + 1e-6))
    assert short.advantage == -long.advantage
    routed = assign_token_weights("vold", [group([1.0, 0.0], lengths=[10, 8])], beta=1.0, overlong_share=0.2)
    assert [s.kl_weight for s in routed] == pytest.approx([0.0, 1 / 18])
    assert build(preset="dapo", overlong_share=0.0).overlong is None


def test_kdrl_masks():
    rewards = [1.0, 0.0, 0.25]
    assert routing.every(rewards) == [1, 1, 1]
    assert routing.failed(rewards) == [0, 1, 0.75]
    assert routing.failed_groups(rewards) == [0, 0, 0] and routing.failed_groups([0.0, 0.0]) == [1, 1]
    groups = [group([1.0, 0.0]), group([0.0, 0.0])]
    routed = {
        name: [s.kl_weight > 0 for s in assign_token_weights(name, groups)]
        for name in ("kdrl", "kdrl-response", "kdrl-group")
    }
    assert routed == {
        "kdrl": [True] * 4,
        "kdrl-response": [False, True, True, True],
        "kdrl-group": [False, False, True, True],
    }


def test_kdrl_annealing():
    betas = [PRESETS["kdrl"].at_step(step, {}).beta for step in (0, 1, 40, 80, 81, 1000)]
    assert betas == pytest.approx([5e-3, 4.95e-3, 3e-3, 1e-3, 1e-3, 1e-3], rel=1e-12)
    rising = Linear(end=1.0, step_size=0.3)
    assert [rising(0.5, step, {}) for step in range(3)] == pytest.approx([0.5, 0.8, 1.0])


def test_the_target_controller_by_hand():
    schedule = TargetKL(target=0.05, gain=0.1)
    assert schedule(0.3, 0, {}) == 0.3
    assert schedule(0.3, 1, {"beta": 0.2, "kl_teacher": 0.05}) == 0.2
    assert schedule(0.3, 1, {"beta": 0.2, "kl_teacher": 0.055}) == pytest.approx(0.2 * 1.01)
    assert schedule(0.3, 1, {"beta": 0.2, "kl_teacher": 5.0}) == pytest.approx(0.2 * 1.02)
    assert schedule(0.3, 1, {"beta": 0.2, "kl_teacher": 0.0}) == pytest.approx(0.2 * 0.98)
    assert schedule(0.3, 1, {"beta": 0.2}) == 0.2 == schedule(0.3, 1, {"beta": 0.2, "kl_teacher": math.nan})


def test_the_target_controller_finds_the_beta_that_holds_the_target():
    """A student whose KL is 1 / (10 beta) settles at the beta where that is the target."""
    objective = build(preset="vold", beta=0.1, target_kl=0.25)
    last: dict[str, float] = {}
    for step in range(200):
        current = objective.at_step(step, last)
        last = {**current.metrics(), "kl_teacher": 0.1 / current.beta}
    assert current.beta == pytest.approx(0.4, rel=1e-3)


def test_the_entropy_bonus_reaches_responses_without_advantage():
    solved = [group([1.0, 1.0])]
    assert all(s.pg_weight == 0 for s in assign_token_weights("grpo", solved))
    assert all(
        s.pg_weight == 1 / 4 and s.advantage == 0 for s in assign_token_weights("grpo", solved, entropy_bonus=0.01)
    )


def test_minibatches_hold_whole_groups_and_each_its_own_normaliser():
    groups = [group([1.0, 0.0], lengths=[n, n + 1], name=str(n)) for n in (1, 3, 5, 7, 9)]
    objective = build(preset="vold")
    samples = objective.assign_token_weights(groups, minibatches=2)
    assert [s.minibatch for s in samples] == [0] * 4 + [1] * 6
    assert samples[0].pg_weight == pytest.approx(1 / (3 + 7)) and samples[-1].pg_weight == pytest.approx(1 / 45)
    first, second = split_minibatches(samples)
    assert len(first) == len(second) == len(samples), "a sample's place is that among all samples of the step"
    assert first[:4] == samples[:4] and second[4:] == samples[4:]
    assert all(s.pg_weight == s.kl_weight == 0 for s in [*first[4:], *second[:4]])
    whole = objective.assign_token_weights(groups)
    assert split_minibatches(whole) == [whole] and split_minibatches([]) == [[]]
    one_group = objective.assign_token_weights(groups[:1], minibatches=4)
    assert split_minibatches(one_group) == [one_group], "no update without a sample"


def test_every_part_can_be_changed_by_its_name():
    changed = build(
        preset="grpo", advantage="mean-centred", ratio="sequence", normaliser="constant", clip_eps_high=0.28
    )
    expected = replace(
        PRESETS["grpo"],
        advantage=mean_centred,
        ratio=ratios.SEQUENCE,
        normaliser=constant,
        clip_eps_high=0.28,
        max_response_tokens=LONGEST,
    )
    assert changed == expected
    gated = replace(
        PRESETS["grpo"], routing=routing.failed, beta=0.5, schedule=Linear(0.1, 0.01), max_response_tokens=LONGEST
    )
    assert build(preset="grpo", routing="failed", beta=0.5, beta_end=0.1, beta_step=0.01) == gated
    with pytest.raises(ValueError, match=r"objective.ratio = 'sequnce' is unknown; choose one of token, sequence"):
        build(ratio="sequnce")
    with pytest.raises(ValueError, match=r"objective.target_kl steers beta in proportion, from objective.beta = 0"):
        build(preset="grpo", routing="failed", target_kl=0.1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("k1", "expected gradient is 0"), ("k3", "that of KL(teacher || student)")],
)
def test_divergences_that_would_train_the_wrong_thing_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=rf"objective.divergence = '{name}': .*; set objective") as error:
        build(divergence=name)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_what_each_divergence_trains_on_policy():
    """The expectation over the student's own samples, exactly, as a sum over the vocabulary: k1 trains nothing, k2
    KL(S || T), k3 KL(T || S). Where samples fall carries no gradient of its own: the loss is theirs as drawn."""
    torch.manual_seed(0)
    logits_V = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logp_teacher_V = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logp_V = logits_V.log_softmax(0)
    gap_V, drawn_V = logp_V - logp_teacher_V, logp_V.exp().detach()
    gradient = lambda loss: torch.autograd.grad(loss, logits_V, retain_graph=True)[0]  # noqa: E731
    reverse = gradient((logp_V.exp() * gap_V).sum())
    forward = gradient(-(logp_teacher_V.exp() * gap_V).sum())
    assert (reverse - forward).abs().max() > 0.01
    k1, k2, k3 = (drawn_V * estimate for estimate in (gap_V, gap_V.square() / 2, (-gap_V).exp() - 1 + gap_V))
    assert gradient(k1.sum()).abs().max() < 1e-15
    assert torch.allclose(gradient(k2.sum()), reverse, rtol=0, atol=1e-15)
    assert torch.allclose(gradient(k3.sum()), forward, rtol=0, atol=1e-15)


def test_only_objectives_and_configs_know_a_methods_name():
    """So that a new one touches no other file. A message may advise one, and a config's default is one; what may not be
    is `PRESETS[...]`, or a name that decides. The miniature and the report know the arms that they show."""
    known = "|".join(map(re.escape, PRESETS))
    decides = r"(?:[!=]=|\bcase\b|\b(?:if|and|or|not)\b[^\n]*\bin)"
    branch = re.compile(rf"PRESETS\b|preset\s*[!=]=|{decides}\s*[(\[{{]?\s*[\"'](?:{known})[\"']")
    code = [path for folder in ("vold", "kernels") for path in (ROOT / folder).rglob("*.py")]
    code = [path for path in code if path.parent.name not in ("objectives", "miniature", "report")]
    found = {str(path.relative_to(ROOT)) for path in code if branch.search(path.read_text())}
    assert found == {"vold/__init__.py"} and len(code) > 80  # which exports PRESETS, and does not look into it
    assert "PRESETS[" not in (ROOT / "vold" / "__init__.py").read_text()
    assert branch.search("if config.objective.preset == name:") and branch.search('if name in ("grpo", "vold"):')


def test_a_new_preset_needs_no_other_code(monkeypatch):
    """Any value of existing parts trains: everything else is read off the Objective itself."""
    own = Objective(mean_centred, routing.failed_groups, ratio=ratios.SEQUENCE, normaliser=constant, beta=0.5)
    monkeypatch.setitem(PRESETS, "own", own)
    assert build(preset="own").needs_teacher
    samples = assign_token_weights("own", [group([0.0, 0.0]), group([1.0, 0.0])])
    assert [s.kl_weight for s in samples] == pytest.approx([0.5 / (4 * LONGEST)] * 2 + [0.0] * 2)
    assert [s.advantage for s in samples] == [0.0, 0.0, 0.5, -0.5]


def test_every_preset_has_a_row_and_a_config():
    rows = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "methods.md").read_text(), re.M))
    configs = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert rows == set(PRESETS) == configs - {"x-reasoner", "x-reasoner-sft"}
