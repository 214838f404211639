"""The best checkpoint: kept, found again after an interruption, exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import same_tensors
from vold.commands import export
from vold.config.schema import ExportConfig
from vold.evaluation.evaluator import Evaluator
from vold.train import training_run
from vold.train.sft import train_sft


@pytest.fixture
def judged(load, tmp_path, world, layout, monkeypatch):
    """judged(*accuracies, resume) -> sft for five steps, each judged so and saved; one stays, and the best."""
    text = f"{{text: {{path: {world.data / 'val_text.json'}, layout: orz}}}}"
    evaluation = f"{{every: 1, best: text, sets: {text}, sampling: {{max_new_tokens: 1, temperature: 0.0}}}}"
    settings = [f"evaluation={evaluation}", "steps=5", "save_every=1", "keep_checkpoints=1"]
    config = load("sft", tmp_path / "judged", *settings)

    def run(*accuracies: float, resume: bool = False):
        given = iter(accuracies)
        monkeypatch.setattr(Evaluator, "run", lambda *_: {"text": [next(given)]})
        monkeypatch.setattr(training_run, "summarise", lambda rows: {"accuracy": rows[0], "stderr": 0.0})
        train_sft(config, resume=resume)
        return config

    run.checkpoints = config.run_dir / "checkpoints"
    return run


def steps_of(checkpoints: Path) -> dict[str, list[int]]:
    """Which are there, and which one is the best."""
    found = [int(path.name[5:]) for path in checkpoints.glob("step-*")]
    return {"saved": sorted(found), "best": [int((checkpoints / "best").read_text()[5:])]}


def test_the_best_checkpoint_stays_and_can_be_exported(judged, tmp_path):
    run = judged(0.2, 0.5, 0.5, 0.3, 0.1).run_dir
    assert steps_of(judged.checkpoints) == {"saved": [2, 5], "best": [2]}, "of equals the earlier"
    for step in ("best", 2):
        export.export_model(ExportConfig(run=run, out=tmp_path / f"{step}", step=step))
    best, second, last = (path / "model.safetensors" for path in (tmp_path / "best", tmp_path / "2", run / "model"))
    assert same_tensors(best, second) and not same_tensors(best, last)


@pytest.mark.parametrize(("rest", "then"), [((0.5, 0.1), [2]), ((0.4, 0.6), [5])])
@pytest.mark.parametrize("pointer", ["step-000003\n", "garbage", None])
def test_a_resumed_run_knows_the_best(judged, rest, then, pointer):
    """By its log, whatever the pointer says: the run may have been killed before the pointer moved."""
    with pytest.raises(StopIteration):
        judged(0.2, 0.5, 0.3)
    assert steps_of(judged.checkpoints) == {"saved": [2, 3], "best": [2]}
    (judged.checkpoints / "best").unlink()
    if pointer:
        (judged.checkpoints / "best").write_text(pointer)
    judged(*rest, resume=True)
    assert steps_of(judged.checkpoints) == {"saved": sorted({5, *then}), "best": then}
