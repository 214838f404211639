"""The training-step benchmark: both providers do the same work, the real shapes are the real models'."""

from __future__ import annotations

import pytest

from benchmarks import train_step
from benchmarks.harness import read_rows
from vold.models.architecture import Architecture
from vold.models.flops import segment_flops


@pytest.mark.parametrize("arguments", [[], ["--no-teacher"]])
def test_both_providers_give_one_loss_and_a_row(arguments, launch, tmp_path):
    size = ["--scale", "0.03125", "--tokens", "40", "--sequences", "2", "--runs", "1", "--out", tmp_path]
    done = launch(1, "-m", "benchmarks.train_step", *size, *arguments)
    assert done.returncode == 0, done.stderr
    ours, logits = read_rows(tmp_path / "train_step-cpu.csv")
    assert tuple(ours) == train_step.COLUMNS
    assert (ours["provider"], logits["provider"]) == (train_step.OURS, train_step.LOGITS)
    assert float(ours["loss"]) == pytest.approx(float(logits["loss"]), rel=1e-4)
    assert float(ours["grad_norm"]) == pytest.approx(float(logits["grad_norm"]), rel=1e-4)
    assert ours["loss_tokens"] == logits["loss_tokens"] == str(2 * 16)
    assert float(ours["student_backward_s"]) > 0 and bool(ours["teacher_hidden"]) is (not arguments)


def test_disagreement_is_noticed():
    def result_with(loss: float) -> dict:
        return {"metrics": {"loss": loss, "grad_norm": 1.0}}

    train_step._check_same({"a": result_with(1.0), "b": result_with(1.01)})
    with pytest.raises(RuntimeError, match="disagree on loss"):
        train_step._check_same({"a": result_with(1.0), "b": result_with(1.1)})


def test_full_scale_is_the_real_pair():
    """Parameters by hand from the released configs: 3.09e9 in the text part of Qwen2.5-VL-3B, 8.19e9 in Qwen3-8B."""
    for config, matmul_weights in (
        (train_step.student_config(1), 3.09e9),  # the tied embedding is the head
        (train_step.teacher_config(1), 8.19e9 - 151936 * 4096),
    ):
        arch = Architecture.from_config(config)
        assert segment_flops(arch, 1, 1) / 6 == pytest.approx(matmul_weights, rel=2e-3)
