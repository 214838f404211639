"""Rewards that public trainers got wrong, one test for each thread (project#number)."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from vold.config.schema import DataConfig
from vold.data.problems import load_problems
from vold.grading import Grader, pool

HANGS, FINE = r"\boxed{100000000!}", (r"\boxed{\sqrt{432}}", r"12\sqrt{3}", False)


@pytest.fixture(scope="module")
def grader():
    with pytest.MonkeyPatch.context() as patch, Grader(workers=2, seconds=1) as grader:
        patch.setattr(pool, "_PATIENCE", 200)  # a busy machine's tests wait for CPU
        yield grader


@pytest.mark.parametrize("response", ["<answer></answer>", r"<answer>\boxed{}</answer>", r"\boxed{ }", r"\boxed{$$}"])
def test_visual_rft_176_an_empty_answer_is_in_no_gold(grader, response):
    (verdict,) = grader.grade([(response, "a circle of radius 7", False)])
    assert verdict.outcome == "wrong"


@pytest.mark.parametrize(("answer", "gold"), [("circle", "a circle"), ("1", "12"), ("2", "12"), ("", "12")])
def test_visual_rft_176_part_of_the_gold_is_not_the_gold(grader, answer, gold):
    assert grader.grade([(rf"\boxed{{{answer}}}", gold, False)])[0].outcome == "wrong"


def test_math_verify_50_55_65_hangs_leave_later_answers_right(grader):
    """Also verl#5635, open-r1#420, simpleRL#95, rllm#433, Reasoning360#109, monarch#4795, AReaL#1426, UniRL#462."""
    verdicts = grader.grade([(HANGS, "7", False), (r"\boxed{9^{9^{9^9}}}", "7", False), FINE])
    assert [verdict.outcome for verdict in verdicts] == ["wrong", "wrong", "correct"]
    assert grader.grade([FINE])[0].outcome == "correct"


def test_verl_5839_grading_works_off_the_main_thread(grader):
    """math-verify's own time limit is a signal, which only the main thread may set."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(grader.grade([(HANGS, "7", False), FINE])))
    thread.start()
    thread.join()
    assert [(verdict.outcome, verdict.rule) for verdict in found] == [("wrong", "timeout"), ("correct", "algebra")]


def test_fireworks_cookbook_438_the_trainers_own_alarm_is_left_alone(grader):
    """There, a SIGALRM exception was swallowed by a garbage-collector callback, and the hang stayed."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 1000)
        grader.grade([(HANGS, "7", False)])
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_trl_6439_a_truncated_response_is_wrong_even_if_its_answer_is_right(grader):
    (verdict,) = grader.grade([(r"\boxed{7}", "7", True)])
    assert (verdict.outcome, verdict.rule) == ("wrong", "truncated")


@pytest.mark.parametrize("gold", ["", "$$", r"\frac{1}{2", r"7 \boxed{8}", "7</think>", "9" * 5000])
def test_a_gold_that_cannot_grade_itself_stops_the_load_with_file_and_row(tmp_path, gold):
    path = tmp_path / "set.json"
    good = {"prompt": [{"from": "user", "value": "?"}], "final_answer": "7"}
    path.write_text(json.dumps([good, {**good, "final_answer": gold}]))
    with pytest.raises(ValueError, match=r"set.json row 2: gold answer") as error:
        load_problems(DataConfig(path=path, layout="orz-eval"))
    assert "\n" not in str(error.value)
    said = []
    assert len(load_problems(DataConfig(path=path, layout="orz-eval", on_error="skip"), said.append)) == 1
    assert len(said) == 1
