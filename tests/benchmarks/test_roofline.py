"""The arithmetic of `benchmarks.roofline`, computed here by hand, and what it predicts for an H200."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.problem import LOGPROB, POLICY_LOSS
from vold_kernels import waves
from vold_kernels.chunks import ChunkBudget

GPU = roofline.Gpu("toy", matmul=1e9, bandwidth=1e6, sms=4, issue=1e12, capability=90)
SHAPE = waves.HeadShape(tokens=300, hidden=64, rows=512)
ONE_LANE = roofline.Design("one lane", ChunkBudget(2 * 128 * 512 * 4 // 2, max_tokens=128), 1, False)


def test_phases_by_hand():
    """Chunks of 112, 112 and 76 tokens (300 in three equal shares of steps of 16): each of the logits is one wave of 2
    blocks on 4 SMs, each dH one of 1 block, each dW one of 4."""
    assert roofline.sizes(SHAPE, POLICY_LOSS, ONE_LANE, GPU) == (112, 512)
    logits, fold, dlogits, d_hidden, d_weight = roofline.phases(SHAPE, POLICY_LOSS, ONE_LANE, GPU)
    assert logits.flops == d_hidden.flops == d_weight.flops == 2 * 300 * 64 * 512
    wave = 2 * 128 * 256 * 4 / 1e9  # seconds per unit of depth
    assert logits.bytes == 2 * 64 * (300 + 3 * 512) + 4 * 300 * 512
    assert logits.seconds == pytest.approx(3 * 64 * wave + 4 * 300 * 512 / 2 / 1e6)
    assert (fold.bytes, dlogits.bytes) == (4 * 300 * 512, 6 * 300 * 512)
    assert (fold.seconds, dlogits.seconds) == (pytest.approx(fold.bytes / 1e6), pytest.approx(dlogits.bytes / 1e6))
    assert d_hidden.bytes == 2 * (300 * 512 + 3 * 512 * 64) + 4 * 300 * 64
    assert d_hidden.seconds == pytest.approx(3 * 512 * wave + 4 * 300 * 64 / 2 / 1e6)
    assert d_weight.bytes == 2 * (300 * 512 + 300 * 64) + 8 * 3 * 512 * 64
    assert d_weight.seconds == pytest.approx(300 * wave + 8 * 3 * 512 * 64 / 2 / 1e6)
    assert roofline.floor_seconds(SHAPE, POLICY_LOSS, GPU) == 6 * 300 * 64 * 512 / 1e9


def test_row_kernels_under_a_matmul_take_its_processors():
    alone = roofline._row_kernel("fold", 1000, 4, False, 8.0, GPU)
    under = roofline._row_kernel("fold", 1000, 4, True, 8.0, GPU)
    slow = roofline._row_kernel("fold", 1000, 4, True, 8.0, roofline.Gpu("slow", 1e9, 1e6, 4, 1e6, 90))
    assert alone.seconds == 4000 / 1e6 and under.seconds == pytest.approx(4000 / (4 * 80e9))
    assert slow.seconds == pytest.approx(8000 / 0.7e6)


@pytest.mark.parametrize(("head", "bound"), [("student", 1.15), ("teacher", 1.10)])
def test_an_h200_is_near_the_floor(head, bound):
    mode, hidden = roofline.HEADS[head]
    shape, gpu = waves.HeadShape(8192, hidden, roofline.VOCAB), roofline.GPUS["h200"]
    floor = roofline.floor_seconds(shape, mode, gpu)
    shares = [sum(p.seconds for p in roofline.phases(shape, mode, d, gpu)) / floor for d in roofline.DESIGNS]
    before, one_lane, two_lanes, short, bf16 = shares
    assert before > one_lane > two_lanes > bf16 > 1 and two_lanes <= short and two_lanes <= bound


def test_nothing_is_called_measured_without_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    shape = waves.HeadShape(8192, 2048, roofline.VOCAB)
    assert roofline.measured(shape, LOGPROB, roofline.GPUS["h200"]) == "not measured"
    keys = "mode,provider,status,tokens,hidden,vocab,device,median_s,commit"
    row = "forward,vold_kernels,measured,8192,2048,151936,NVIDIA H200,0.0071,abc"
    (tmp_path / "kernels-cuda.csv").write_text(f"{keys}\n{row}\n")
    assert roofline.measured(shape, LOGPROB, roofline.GPUS["h200"]) == "7.10 ms at commit abc"
    assert roofline.measured(shape, LOGPROB, roofline.GPUS["a100"]) == "not measured"


def test_the_default_design_is_the_default_budget():
    assert roofline.DESIGNS[2].budget == roofline.default_budget(torch.device("cuda"))
