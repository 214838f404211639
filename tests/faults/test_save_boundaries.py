"""A save is killed at every file operation it makes; what loads afterwards is the old step or the new one, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from support import ranks, saving
from support.steps import make_trainer
from vold.parallel.launch import Layout
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.optimizer import optimizer_state, updates_made

KILLED = 137
MODES = {  # what the kill leaves of the file in hand
    "before": "nothing of the operation",
    "torn": "half of the file",
    "unsynced": "nothing that was not fsynced",
}


def state_of(trainer) -> list[torch.Tensor]:
    moments = [v for p in trainer.parameters.values() for v in optimizer_state(trainer.optimizer, p).values()]
    numbers = torch.tensor([updates_made(trainer.optimizer), trainer.schedule.num_steps])
    return [t.detach().clone() for t in (*trainer.parameters.values(), *moments, numbers, torch.get_rng_state())]


@pytest.fixture(scope="module")
def steps_1_and_2(tiny_student_dir, layout: Layout, tmp_path_factory) -> tuple[Path, dict[int, list[torch.Tensor]]]:
    """A run directory with two checkpoints, and the states of steps 2 and 3."""
    run_dir, states = tmp_path_factory.mktemp("boundaries"), {}
    trainer, checkpoints = make_trainer(tiny_student_dir, layout), Checkpoints(run_dir, layout)
    for step in (1, 2, 3):
        if step == 3:
            torch.rand(3)
        trainer.step(saving.BATCH)
        states[step] = state_of(trainer)
        if step < 3:
            checkpoints.save(trainer, step)
    return run_dir, states


def test_killed_at_every_boundary(steps_1_and_2, tiny_student_dir, layout, tmp_path):
    before, states = steps_1_and_2

    def killed(boundary: int | None, mode: str) -> tuple[Path, int, list[str]]:
        run_dir, log = tmp_path / f"{mode}-{boundary}", tmp_path / "operations"
        shutil.copytree(before, run_dir)
        world = ranks.start(1, saving.save_step_3, tiny_student_dir, run_dir, log, boundary, mode, logs=tmp_path)
        (code,) = world.join()
        assert code in (0, KILLED), world.output()
        return run_dir, code, log.read_text().splitlines()

    _, code, operations = killed(None, "before")
    assert code == 0 and len(operations) > 10
    kinds = "\n".join(operations)
    assert all(kind in kinds for kind in ("os.mkdir", "safetensors", "state.json", "manifest", "os.rename", "latest"))
    assert "os.remove" in kinds or "shutil.rmtree" in kinds, "what is no longer kept is removed"

    trainer, found = make_trainer(tiny_student_dir, layout), []
    for mode in MODES:
        for boundary, operation in enumerate(operations, 1):
            if mode == "torn" and operation.endswith("\t0"):  # not a write
                continue
            run_dir, code, _ = killed(boundary, mode)
            assert code == KILLED
            checkpoints = Checkpoints(run_dir, layout, keep=1)
            step = checkpoints.latest_step()
            checkpoints.load(trainer, step)
            assert all(map(torch.equal, state_of(trainer), states[step])), (mode, operation)
            checkpoints.save(trainer, 4)  # the leftovers are in nobody's way
            assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-000004", "latest"}
            found.append(step)
            shutil.rmtree(run_dir)
    assert set(found) == {2, 3}
