"""What the page shows of samples' tokens, of a step's phases, and of runs side by side."""

import math
import re

import pytest
from made_up_runs import timeline as made_up_timeline

from vold.report import RunRecord
from vold.report.compare import compare
from vold.report.samples import PER_LIST, sample_lists
from vold.report.timeline import step_figure, step_timeline
from vold.report.tokens import ENDS, tokens_of


def test_a_token_s_shade_is_its_gap():
    row = {
        "tokens": list("abcde"),
        "logp": [-1.0, -0.1, -5.0, 0.0, 0.0],
        "logp_teacher": [-1.05, -3.2, -0.9, -0.6, None],
    }
    tokens = tokens_of(row)
    assert tokens.scored and [token.shade for token in tokens.head] == ["", "u4", "d4", "u2", ""]
    assert [token.text for token in tokens.widest] == ["c", "b", "d"] and tokens.left_out == 0
    assert tokens.widest[1].gap == pytest.approx(3.1)


def test_of_a_long_response_both_ends_are_shown_and_the_widest_gap_of_all():
    n = 3 * ENDS
    teacher = [0.0] * n
    teacher[ENDS + 5] = -4.0
    tokens = tokens_of({"tokens": [str(i) for i in range(n)], "logp": [0.0] * n, "logp_teacher": teacher})
    assert (len(tokens.head), tokens.left_out, len(tokens.tail)) == (ENDS, ENDS, ENDS)
    assert tokens.tail[-1].text == str(n - 1) and [token.text for token in tokens.widest] == [str(ENDS + 5)]


@pytest.mark.parametrize(
    "row", [{}, {"tokens": ["a"], "logp": [0.0, 1.0]}, {"tokens": [], "logp": []}, {"tokens": "ab", "logp": [0, 0]}]
)
def test_rows_without_tokens_have_none(row):
    assert tokens_of(row) is None


def test_a_response_the_teacher_was_not_asked_about_has_no_colour():
    tokens = tokens_of({"tokens": ["a"], "logp": [-9.0]})
    assert not tokens.scored and tokens.head[0].shade == "" and tokens.widest == []


def test_samples_are_of_steps_all_along_the_run_newest_first():
    rows = [{"step": step, "reward": float(i % 3 == 0), "response": "x"} for step in range(50) for i in range(8)]
    [samples] = sample_lists([RunRecord("vold", path=None, metrics={"reward": [0.0]}, samples=tuple(rows))])
    steps = [int(sample.origin.split()[1]) for sample in samples.samples]
    assert len(steps) == PER_LIST and steps == sorted(steps, reverse=True) and {0, 49} <= set(steps)
    assert [sample.correct for sample in samples.samples[:4]] == [False, True, False, True]
    assert (samples.n_correct, samples.n_wrong) == (150, 250)


def test_a_timeline_is_of_an_ordinary_step_with_its_phases_nested():
    timeline = step_timeline(RunRecord("vold", path=None, timeline=tuple(made_up_timeline())))
    assert timeline.step == "44" and timeline.seconds == pytest.approx(2.3)
    names = [(thread, [interval.name for interval in row]) for thread, row in timeline.rows]
    nested = [("", ["rollout", "train"]), ("", ["student_backward"]), ("", ["student_forward"])]
    assert names == [*nested, ("ahead", ["grade"])], "500 short intervals are one"
    for _, row in timeline.rows:
        assert all(i.start >= 0 and i.end <= timeline.seconds + 1e-6 for i in row)
    train = timeline.rows[0][1][1]
    assert train.start == pytest.approx(1.2) and train.end - train.start == pytest.approx(1.1)
    drawn = step_figure(timeline).decode()
    assert 4 <= len(re.findall(r">[\d.]+ s<", drawn)) <= 9, "ticks"
    assert all(f">{name}<" in drawn for name in ("rollout", "train", "student forward", "grade", "ahead thread"))
    assert 'id="tooltip student backward 1.0 s"' in drawn


@pytest.mark.parametrize("intervals", [None, [], [["a", "train", "x", 1]], [["a", "train", 2, 1]], ["a"], {"a": 1}])
def test_a_damaged_timeline_is_none(intervals):
    assert step_timeline(RunRecord("a", path=None, timeline=({"step": 1, "intervals": intervals},))) is None


def run(name, reward, **more):
    metrics = {"step": [float(i + 1) for i in range(len(reward))], "reward": reward, **more}
    return RunRecord(name, path=None, config={"verb": "rl"}, metrics=metrics)


def test_compared_runs_end_with_a_standard_error_and_only_a_clear_lead_is_bold():
    gap = [math.nan, 0.5] * 10
    wobble = [0.0] * 18 + [0.415, 0.385]
    vold = run("vold", wobble, accuracy_text=gap, stderr_text=[0.04] * 20, entropy=[0.5] * 20)
    grpo = run("grpo", [x - 0.05 for x in wobble], accuracy_text=[math.nan, 0.45] * 10, stderr_text=[0.04] * 20)
    [table] = compare([vold, grpo])
    rows = {described.label: cells for described, cells in table.rows}
    assert [cell.text for cell in rows["Reward"]] == ["0.400 ± 0.015", "0.350 ± 0.015"]
    assert [cell.steps for cell in rows["Reward"]] == ["last 2 steps"] * 2
    assert [cell.best for cell in rows["Reward"]] == [True, False]
    assert [cell.text for cell in rows["Text accuracy"]] == ["50.0 ± 4.0 %", "45.0 ± 4.0 %"]
    assert not any(cell.best for cell in rows["Text accuracy"])
    assert rows["Entropy"][1] is None and not rows["Entropy"][0].best


def test_a_run_alone_and_runs_of_different_verbs_are_not_compared():
    other = RunRecord("sft", path=None, config={"verb": "sft"}, metrics={"step": [1.0], "loss": [1.0]})
    assert compare([run("vold", [0.5]), other]) == []
