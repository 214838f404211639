"""`vold export` of a run's checkpoints."""

from __future__ import annotations

import pytest

from support.runs import same_tensors
from vold.commands import export
from vold.config.schema import ExportConfig


def test_export_of_a_checkpoint_equals_the_exported_model(rl_run, tmp_path):
    export.export_model(ExportConfig(run=rl_run.run_dir, out=tmp_path / "exported"))
    assert same_tensors(tmp_path / "exported/model.safetensors", rl_run.run_dir / "model/model.safetensors")
    early = ExportConfig(run=rl_run.run_dir, out=tmp_path / "early", step=2)
    export.export_model(early)
    assert not same_tensors(tmp_path / "early/model.safetensors", rl_run.run_dir / "model/model.safetensors")


def test_no_best_checkpoint(load, rl_run, tmp_path):
    with pytest.raises(ValueError, match=r"has no best checkpoint \(set evaluation.best\)"):
        export.export_model(ExportConfig(run=rl_run.run_dir, out=tmp_path / "out", step="best"))
    with pytest.raises(ValueError, match=r"evaluation.best = 'images' is none of evaluation.sets: text, image"):
        load("rl", tmp_path / "run", "evaluation.best=images")
    with pytest.raises(ValueError, match=r"evaluation.best = 'text' compares steps; set evaluation.every > 0"):
        load("rl", tmp_path / "run", "evaluation.best=text", "evaluation.every=0")
