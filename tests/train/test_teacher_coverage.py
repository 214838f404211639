"""Metrics of what the teacher reads."""

from __future__ import annotations

import pytest

from vold.data.packing import encode_text


def test_what_the_gate_saves_the_teacher():
    """Whole sequences, prompts included: the second and third of three are not read."""
    from vold.train.teacher_coverage import teacher_metrics
    from vold.types import Prompt, Sample

    prompt = Prompt("p", (5, 6, 7), "")
    samples = [Sample(prompt, (1,) * length, 1.0, 1.0, weight) for length, weight in [(7, 0.3), (2, 0.0), (5, 0.0)]]
    saved = pytest.approx((5 + 8) / (10 + 5 + 8))
    assert teacher_metrics(samples, encode_text.length) == {"teacher_saved": saved, "teacher_failed": 0.0}
