"""PhaseTimers add up, nest and start anew each step. Clocks are faked: no wall-clock time is asserted."""

from __future__ import annotations

import pytest
import torch

from vold.run import timers
from vold.run.timers import PhaseTimers


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock of CUDA events is the device's")
def test_repeated_and_nested_phases(clock):
    phase = PhaseTimers()
    for _ in range(2):
        with phase("train"):
            clock(1)
            with phase("backward", without="forward"):
                clock(2)
                with phase("forward"):
                    clock(4)
    found = phase.finish_step()
    assert {key: value for key, value in found.items() if key.startswith("seconds")} == {
        "seconds_train": 14,
        "seconds_backward": 4,
        "seconds_forward": 8,
    }
    assert all(found[f"memory_gib_{name}"] > 0 for name in ("train", "backward", "forward"))
    assert phase.peak_gib >= found["memory_gib_train"] > 0
    assert phase.finish_step() == {}


def test_a_phase_that_fails_is_still_closed(clock):
    phase = PhaseTimers()
    with pytest.raises(KeyError), phase("rollout"):
        clock(1)
        raise KeyError
    with phase("grade"):
        clock(1)
    assert {"seconds_rollout", "seconds_grade"} <= phase.finish_step().keys() and phase._open == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock of CUDA events is the device's")
def test_a_timeline_shows_what_ran_beside_the_step(clock):
    """Work of another thread takes none of the step's seconds; each interval is handed out once."""
    phase = PhaseTimers()
    beside = phase.thread("rollout")
    clock(1)
    with phase("train"):
        with beside("draw"):
            clock(2)
        clock(1)
    with beside("grade"):
        clock(3)
    assert {key: value for key, value in phase.finish_step().items() if key.startswith("seconds")} == {
        "seconds_train": 3
    }
    assert sorted(phase.intervals) == [
        ("draw", "rollout", 1, 3),
        ("grade", "rollout", 4, 7),
        ("train", PhaseTimers.MAIN_THREAD, 1, 4),
    ]
    assert phase.finish_step() == {} and phase.intervals == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_charge_work_to_the_phase_that_launched_it():
    phase, x = PhaseTimers(), torch.randn(4096, 4096, device="cuda")
    with phase("big"):
        y = x
        for _ in range(20):
            y = y @ x
    with phase("small"):
        x + 1
    found = phase.finish_step()
    assert found["seconds_big"] > 10 * found["seconds_small"]
    assert found["memory_gib_big"] >= 2 * x.numel() * 4 / 2**30
