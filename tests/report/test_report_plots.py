"""Figures: self-contained, reproducible, and honest about gaps."""

import io
import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from made_up_runs import REPORT, write_demo
from PIL import Image

from vold.report import RunRecord, accuracy_bars, curve, curves, read_runs, seeds_errorbars
from vold.report.plots import _spread, mean_run, smooth
from vold.report.style import PALETTE, colours


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read_runs([write_demo(tmp_path_factory.mktemp("runs") / "demo", problems=8)])


def test_curves_label_every_run_directly_and_state_units(records):
    text = " ".join(ET.fromstring(curves([r for r in records if r.verb == "rl"])).itertext())
    for part in ("GRPO", "VOLD", "Reward", "Teacher KL", "nats per token", "step"):
        assert part in text


def test_svg_is_the_same_twice(records):
    assert curve(records, "reward") == curve(records, "reward")


def test_png(records):
    assert Image.open(io.BytesIO(accuracy_bars(REPORT, fmt="png"))).size[0] > 600
    with pytest.raises(ValueError, match="'pdf'"):
        curve(records, "reward", fmt="pdf")


def test_curves_say_when_there_is_nothing_to_draw(records):
    with pytest.raises(ValueError, match="none of the runs"):
        curves(records, ["no_such_key"])


def test_a_run_of_one_step_and_a_run_with_gaps():
    one = RunRecord("one", path=None, metrics={"step": [0.0], "reward": [0.5]})
    gaps = RunRecord("gaps", path=None, metrics={"step": [0.0, 1.0, 2.0], "reward": [0.1, math.nan, 0.3]})
    assert b"one" in curve([one, gaps], "reward")


def test_names_are_text_never_mathematics():
    hostile = RunRecord("$\\frac{<b>", path=None, metrics={"step": [0.0, 1.0], "reward": [0.5, 0.6]})
    assert "$\\frac{<b>" in "".join(ET.fromstring(curve([hostile], "reward")).itertext())


def test_runs_of_several_seeds_are_one_labelled_mean():
    runs = [
        RunRecord(f"seed{i}/vold", path=None, metrics={"step": [1.0, 2.0, 3.0], "reward": [i, i + 1.0, last]})
        for i, last in ((0, 4.0), (1, math.nan))
    ]
    mean = mean_run("vold", runs, "reward")
    assert (mean.metrics["step"], mean.metrics["reward"]) == ([1.0, 2.0], [0.5, 1.5])
    text = "".join(ET.fromstring(curve(runs, "reward")).itertext())
    assert text.count("VOLD") == 1 and "seed" not in text


def test_smoothing_keeps_constants_lines_and_gaps():
    assert np.allclose(smooth([2.0] * 50), 2.0)
    line = smooth(np.arange(50.0))
    assert np.allclose(line[2:-2], np.arange(50.0)[2:-2])
    assert np.isnan(smooth([1.0, math.nan, 3.0])).tolist() == [False, True, False]


def test_labels_are_pushed_apart_and_stay_inside():
    placed = _spread([0.99, 0.98, 0.2, 0.97], gap=0.1)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] == 0.2 and ordered[-1] == 0.97
    assert max(placed) == placed[0]  # order is kept


def test_a_run_and_its_evaluation_share_a_colour_that_no_other_has():
    paint = colours(["vold-beta1", "eval_vold", "vold", "grpo", "anything"])
    assert paint["vold"] == paint["eval_vold"] == PALETTE[3] and paint["grpo"] == PALETTE[2]
    assert len({paint[name] for name in ("vold-beta1", "vold", "grpo", "anything")}) == 4


def test_seeds_plot():
    rows = [{"seed": s, "arm": a, "text": 0.5 + 0.01 * s, "image": 0.4} for s in range(3) for a in ("grpo", "vold")]
    text = " ".join(ET.fromstring(seeds_errorbars(rows)).itertext())
    assert "GRPO" in text and "VOLD" in text and "image, % correct" in text
    with pytest.raises(ValueError, match="no accuracy"):
        seeds_errorbars([])
