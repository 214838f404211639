"""VllmTeacher with engines over HTTP: the response's own log-probs or None, never something filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fake_engine import FakeEngine
from vold.config.schema import VllmConfig
from vold.teacher import VllmTeacher
from vold.types import Prompt, Rollout

ROLLOUTS = [
    Rollout(Prompt(f"p{first}", (first, 8, 9), ""), response, (-1.0,) * len(response), "stop", "")
    for first, response in [(11, (21, 22)), (12, (23,)), (13, (24, 25, 26))]
]
SCORES = [[-0.21, -0.22], [-0.23], [-0.24, -0.25, -0.26]]
"""The fake engine's: minus a hundredth of each id."""


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.stop()


@pytest.fixture
def connect(engine, tiny_teacher_dir):
    """Opened with a temperature, so that it shows what the engine was told."""
    opened = []

    def connect(timeout: float = 60.0) -> VllmTeacher:
        settings = VllmConfig(urls=(engine.url,), timeout=timeout, restart_seconds=0.0, retries=1)
        opened.append(VllmTeacher(tiny_teacher_dir, settings, temperature=0.7))
        return opened[-1]

    yield connect
    for teacher in opened:
        teacher.close()


@pytest.fixture
def teacher(connect):
    return connect()


def test_response_positions_only_in_order(teacher):
    assert teacher.submit(ROLLOUTS).result() == SCORES
    assert teacher.submit([]).result() == []


def test_the_engine_has_the_runs_temperature(engine, teacher):
    told = [body["args"] for _, body in engine.calls if body.get("method") == "prepare_policy"]
    assert [arguments[1] for arguments in told] == [0.7]


@pytest.mark.parametrize("fault", ["500", "garbage", "hang", "scores of other ids", "too few scores", "nan", "cut off"])
def test_a_failed_call_is_none_and_the_others_are_scored(engine, connect, fault):
    teacher = connect(timeout=2.0 if fault == "hang" else 60.0)
    engine.fault, engine.victim = fault, 12
    assert teacher.submit(ROLLOUTS).result() == [SCORES[0], None, SCORES[2]]


def test_no_engine_left_is_one_line(engine, teacher):
    engine.fault = "500"
    with pytest.raises(ValueError, match="no vLLM engine of"):
        teacher.submit(ROLLOUTS).result()


def test_a_text_only_teacher_refuses_images_by_name(teacher):
    seen = Rollout(Prompt("a-picture", (5,), "", images=(Path("a.png"),)), (6,), (-1.0,), "stop", "")
    with pytest.raises(ValueError, match="prompt a-picture has images"):
        teacher.submit([*ROLLOUTS, seen])


def test_a_call_does_not_wait_for_the_one_before(engine, teacher):
    engine.held = {11}
    slow, quick = teacher.submit(ROLLOUTS[:1]), teacher.submit(ROLLOUTS[1:])
    assert quick.result() == SCORES[1:] and not slow.done()
    engine.held = set()
    assert slow.result() == SCORES[:1]
