"""`vold profile`: the files it writes; the run directory itself stays empty."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from vold.commands import profile
from vold.config import load_training_config
from vold.config.schema import RlConfig, SftConfig
from vold.report import phase_table, timeline
from vold.report.timeline import Interval
from vold.run.run_dir import read_rows

ROW = {"step": 1, "seconds": 4.0, "seconds_rollout": 1.0, "seconds_train": 2.5, "seconds_student_forward": 1.0}
ROW |= {"seconds_student_backward": 1.25, "seconds_optimizer": 0.25, "response_tokens": 100.0, "gradient_tokens": 50.0}
ROW |= {"train_tflop": 3e-12, "peak_memory_gib": 2.0, "memory_gib_rollout": 1.5}


def test_a_profile_of_two_ranks_is_complete(world, launch, tmp_path):
    """Metrics hold the same numbers, no model is saved, and nothing is written outside run_dir/profile."""
    run_dir = tmp_path / "run"
    overrides = world.overrides("rl", run_dir)
    config = profile.Path(__file__).parents[2] / "vold" / "miniature" / "configs" / "rl.yaml"
    done = launch(2, "-m", "vold", "profile", config, "--steps", 2, *overrides)
    assert done.returncode == 0, done.stderr
    folder = run_dir / "profile"
    assert [path.name for path in run_dir.iterdir()] == ["profile"]
    assert not (folder / "checkpoints").exists() and not (folder / "model").exists()
    rows = list(csv.DictReader((folder / "phases.csv").open()))
    phases = ["rollout", "grade", "teacher", "student_forward", "student_backward", "optimizer", "sync"]
    for rank in "01":
        rank_rows = {row["phase"]: row for row in rows if row["rank"] == rank}
        assert [name for name in rank_rows if name in phases] == phases and {"other", "step"} <= rank_rows.keys()
        assert all(float(rank_rows[name]["memory_gib"]) > 0 for name in phases)
        assert (
            0 < float(rank_rows["student_backward"]["mfu"]) < 1 and float(rank_rows["rollout"]["tokens_per_second"]) > 0
        )
    metrics = read_rows(folder / "metrics.jsonl")
    assert len(metrics) == 1 + 2 + 2 and metrics[1]["seconds_student_backward"] > 0
    assert "layers: rms_norm torch" in done.stdout and "student_backward" in (folder / "phases.md").read_text()
    for rank in range(2):
        trace = json.loads(gzip.decompress((folder / f"trace-rank{rank}.json.gz").read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"rollout", "student_forward", "student_backward", "optimizer"} <= names
    assert (folder / "phases.png").stat().st_size > 5000 and (folder / "phases.svg").stat().st_size > 5000
    spans = timeline.from_csv((folder / "timeline.csv").read_text())
    assert {"rollout", "grade", "teacher", "train", "sync"} <= {span.name for span in spans}
    assert (folder / "timeline.png").stat().st_size > 5000
    idle = timeline.idle_shares(spans)
    assert f"idle in {run_dir}: sampler {idle['sampler']:.0%}, trainer {idle['trainer']:.0%}" in done.stdout


def test_a_profile_is_not_overwritten(tmp_path, load):
    config = load("rl", tmp_path)
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a profile already"):
        profile.profile_steps(config, steps=1)


def test_a_timeline_beside_a_run_that_was_not_profiled(tmp_path, load):
    with pytest.raises(ValueError, match=r"--beside .*other: no .*timeline.csv; profile that run first"):
        profile.profile_steps(load("rl", tmp_path), steps=1, beside=[tmp_path / "other"])


def test_idle_shares_by_hand():
    strict = [Interval("rollout", "train", 0, 4), Interval("grade", "train", 4, 5), Interval("train", "train", 5, 9)]
    strict += [Interval("student_forward", "train", 5, 7), Interval("gather", "train", 9, 10)]
    assert timeline.idle_shares(strict) == pytest.approx({"sampler": 0.5, "trainer": 0.6})
    ahead = [
        Interval("rollout", "rollout", 0, 6),
        Interval("grade", "rollout", 5, 8),
        Interval("teacher", "rollout", 8, 9),
    ]
    ahead += [
        Interval("train", "train", 0, 4),
        Interval("rollout_wait", "train", 4, 9),
        Interval("sync", "train", 9, 10),
    ]
    assert timeline.idle_shares(ahead) == pytest.approx({"sampler": 0.2, "trainer": 0.5})
    assert timeline.from_csv(timeline.to_csv(ahead)) == ahead
    assert timeline.workers_figure({"lag 0": strict, "lag 1": ahead}, fmt="png")[:4] == b"\x89PNG"


def test_the_config_says_which_stage_it_is(world, tmp_path):
    configs = profile.Path(__file__).parents[2] / "vold" / "miniature" / "configs"
    assert isinstance(load_training_config(configs / "rl.yaml"), RlConfig)
    assert isinstance(load_training_config(configs / "sft.yaml"), SftConfig)


def test_phases_of_a_step_add_up_to_it():
    parts = phase_table.split_step(ROW)
    assert list(parts) == ["rollout", "student_forward", "student_backward", "optimizer", "other"]
    assert sum(parts.values()) == ROW["seconds"] and parts["other"] == 0.5


def test_table_by_hand():
    rows = {row.phase: row for row in phase_table.phase_rows([[ROW]], peak_flops=2.0)}
    assert rows["rollout"].tokens_per_second == 100 and rows["rollout"].mfu is None
    assert rows["student_forward"].mfu == 1.0 / (1.0 * 2.0) and rows["student_backward"].mfu == 2.0 / (1.25 * 2.0)
    assert rows["step"].mfu == 3.0 / (4.0 * 2.0) and rows["step"].memory_gib == 2.0
    assert rows["student_backward"].share == 1.25 / 4 and rows["student_backward"].tokens_per_second == 40
    assert phase_table.phase_rows([[ROW]], peak_flops=None)[-1].mfu is None


def test_a_fused_head_works_in_the_forward_phase():
    """A head of two thirds of the work: were it shared out as the layers' is, the backward phase would be too fast."""
    rows = {row.phase: row for row in phase_table.phase_rows([[ROW]], peak_flops=2.0, head_flops=2.0 / 50)}
    assert rows["student_forward"].mfu == pytest.approx((2.0 + 1.0 / 3) / (1.0 * 2.0))
    assert rows["student_backward"].mfu == pytest.approx((2.0 / 3) / (1.25 * 2.0))
    assert rows["step"].mfu == pytest.approx(3.0 / (4.0 * 2.0))
