"""Files of others that attack: each is refused in one visible line, within bounded time and memory."""

from __future__ import annotations

import unicodedata

import pytest
from hostile_inputs import CASES


@pytest.fixture(scope="module")
def printed(stand_in) -> dict[str, tuple[int, str, float, float]]:
    """Mistake -> exit code, standard error, CPU seconds, growth of the process in MB."""
    outcomes = stand_in.outcomes("hostile_inputs")
    return {case.mistake: tuple(outcome) for case, outcome in zip(CASES, outcomes, strict=True)}


def test_there_are_enough():
    assert len({case.mistake for case in CASES}) == len(CASES) >= 37


@pytest.mark.parametrize("mistake", [case.mistake for case in CASES])
def test_an_attack_is_one_line_and_exit_code_2(printed, mistake):
    code, error, seconds, grown = printed[mistake]
    assert "Traceback" not in error, error
    assert len(error.splitlines()) == 1 and error.startswith("vold: "), error
    assert not [c for c in error.strip() if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
    assert code == 2 and len(error) < 4000
    assert seconds < 60.0 and grown < 2000.0  # backstops: an attack that works needs hours or all memory
