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
from vold.report.drawing import spread_labels
from vold.report.plots import POINTS, extremes, trend, trend_of_seeds
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
    single = RunRecord("single", path=None, metrics={"step": [0.0], "reward": [0.5]})
    gaps = RunRecord("gaps", path=None, metrics={"step": [0.0, 1.0, 2.0], "reward": [0.1, math.nan, 0.3]})
    assert b"single" in curve([single, gaps], "reward")


def test_names_are_text_never_mathematics():
    hostile = RunRecord("$\\frac{<b>", path=None, metrics={"step": [0.0, 1.0], "reward": [0.5, 0.6]})
    assert "$\\frac{<b>" in "".join(ET.fromstring(curve([hostile], "reward")).itertext())


def run_of(values, name="run"):
    return RunRecord(name, path=None, metrics={"step": [float(i) for i in range(len(values))], "reward": list(values)})


def test_runs_of_several_seeds_are_one_labelled_mean_with_its_standard_error():
    runs = [run_of([0.0, 0.0, 0.0], "seed0/vold"), run_of([1.0, 1.0, math.nan], "seed1/vold")]
    line = trend_of_seeds(runs, "reward")
    assert line.x.tolist() == [0, 1] and np.allclose(line.mean, 0.5)
    assert np.allclose(line.stderr, np.std([0, 1], ddof=1) / math.sqrt(2))
    text = "".join(ET.fromstring(curve(runs, "reward")).itertext())
    assert text.count("VOLD") == 1 and "seed" not in text


def test_seeds_that_share_no_step_are_drawn_without_a_mean():
    nan = math.nan
    runs = [
        RunRecord(f"seed{i}/vold", path=None, metrics={"step": [1.0, 2.0], "accuracy_text": values})
        for i, values in enumerate([[0.5, nan], [nan, 0.6]])
    ]
    assert "VOLD" in "".join(ET.fromstring(curve(runs, "accuracy_text")).itertext())


def test_smoothing_keeps_constants_lines_and_gaps():
    assert np.allclose(trend(run_of([2.0] * 50), "reward").mean, 2.0)
    line = trend(run_of(np.arange(50.0)), "reward").mean
    assert np.allclose(line[2:-2], np.arange(50.0)[2:-2])
    assert np.isnan(trend(run_of([1.0, math.nan, 3.0]), "reward").mean).tolist() == [False, True, False]


def test_the_band_is_the_standard_error_of_each_window():
    values = np.random.default_rng(0).normal(1e6, 1, 240)  # far from zero: sums of squares must not lose the scatter
    line, half = trend(run_of(values), "reward"), 10
    window = values[100 - half : 100 + half + 1]
    assert line.mean[100] == pytest.approx(window.mean(), abs=1e-6)
    assert line.stderr[100] == pytest.approx(window.std(ddof=1) / math.sqrt(len(window)), rel=1e-6)


def test_a_long_run_is_drawn_with_few_points_and_its_spikes():
    values = np.random.default_rng(0).normal(size=10_000)
    values[7_777], values[1_234] = 50, -50
    x, _ = extremes(np.arange(10_000.0), values)
    assert len(x) <= 2 * POINTS and {7_777, 1_234} <= set(x) and np.all(np.diff(x) > 0)
    evaluated = RunRecord(
        "e", path=None, metrics={"step": list(range(10_000)), "accuracy_text": [0.5, math.nan] * 5_000}
    )
    assert len(curve([run_of(values)], "reward")) < 60_000 > len(curve([evaluated], "accuracy_text"))


def test_labels_are_pushed_apart_and_stay_inside():
    placed = spread_labels([0.99, 0.98, 0.2, 0.97], gap=0.1)
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
