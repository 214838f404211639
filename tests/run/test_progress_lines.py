"""The lines that a run prints off a terminal."""

from __future__ import annotations

from vold.run.progress import accuracy_line, step_line


def test_a_step_says_what_it_measured_and_how_long_is_left():
    row = {"reward": 0.4123, "kl_teacher": 0.23, "tokens_per_second": 1200.4, "seconds": 2.1}
    assert step_line("rl", 3, 60, row, 125.0) == "rl 3/60 · reward 0.412 · kl 0.230 · 1200 tok/s · 2.1 s · 02:05 left"
    assert step_line("rl", 3, 60, row, 4000.0).endswith(" · 01:06:40 left")
    assert step_line("rl", 3, 60, row, 200_000.0).endswith(" · 2.3 days left")
    assert step_line("selfplay", 0, 5, {"seconds": 3.0}, 15.0) == "selfplay 0/5 · 3.0 s"


def test_an_accuracy_has_an_error_only_where_one_was_measured():
    row = {"accuracy_text": 0.46, "stderr_text": 0.025, "accuracy_image": 0.44}
    assert accuracy_line(row) == "text 46.0 ± 2.5 %, image 44.0 %"
    assert accuracy_line({"reward": 1.0}) == ""
