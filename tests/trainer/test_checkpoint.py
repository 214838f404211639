"""A checkpoint on one rank: whole, exact, checked on load, replaced only by a committed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from support.steps import assign_token_weights, batch_of, make_groups, make_trainer
from vold.parallel.launch import Layout
from vold.trainer import checkpoint as checkpoint_module
from vold.trainer.checkpoint import Checkpoints, verify
from vold.trainer.optimizer import optimizer_state, updates_made
from vold.trainer.trainer import Trainer

MIXED = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
BATCH = batch_of(assign_token_weights("grpo", make_groups(MIXED)), max_tokens=40)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything a step depends on."""
    found = {"random": torch.get_rng_state(), "updates": torch.tensor(updates_made(trainer.optimizer))}
    found["schedule"] = torch.tensor([trainer.schedule.num_steps, trainer.optimizer.param_groups[0]["lr"]]).double()
    for name, parameter in trainer.parameters.items():
        found[name] = parameter.detach().clone()
        for field, value in optimizer_state(trainer.optimizer, parameter).items():
            found[f"{name}/{field}"] = value.clone()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved(tiny_student_dir, layout: Layout, tmp_path_factory) -> tuple[Path, Trainer, dict, dict]:
    """run_dir with steps 1 and 2, its trainer, and the states after steps 2 and 3 of the uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("saved")
    trainer, checkpoints = make_trainer(tiny_student_dir, layout, warmup_steps=3), Checkpoints(run_dir, layout)
    states = []
    for step in (1, 2, 3):
        torch.rand(3)  # a step that draws
        trainer.step(BATCH)
        states.append(state_of(trainer))
        if step < 3:
            checkpoints.save(trainer, step)
    return run_dir, trainer, states[1], states[2]


@pytest.fixture
def copied(saved, tmp_path, layout) -> tuple[Path, Checkpoints]:
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run" / "checkpoints", Checkpoints(tmp_path / "run", layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_trainer_goes_on_bit_for_bit(saved, dtype, tiny_student_dir, layout, tmp_path):
    run_dir, _, at_2, at_3 = saved
    if dtype != torch.float32:  # masters are the state, the bfloat16 weights follow
        run_dir, first = tmp_path, make_trainer(tiny_student_dir, layout, warmup_steps=3, dtype=dtype)
        for _ in range(2):
            first.step(BATCH)
        at_2 = state_of(first)
        Checkpoints(run_dir, layout).save(first, 2)
        torch.rand(3)
        first.step(BATCH)
        at_3 = state_of(first)
    resumed = make_trainer(tiny_student_dir, layout, warmup_steps=3, dtype=dtype)
    torch.rand(5)
    assert not equal(state_of(resumed), at_2)
    Checkpoints(run_dir, layout).load(resumed, 2)
    assert equal(state_of(resumed), at_2)
    torch.rand(3)
    resumed.step(BATCH)
    assert equal(state_of(resumed), at_3)


def test_a_checkpoint_before_the_first_update(tiny_student_dir, layout, tmp_path):
    first = make_trainer(tiny_student_dir, layout)
    Checkpoints(tmp_path, layout).save(first, 0)
    resumed = make_trainer(tiny_student_dir, layout)
    Checkpoints(tmp_path, layout).load(resumed, 0)
    assert equal(state_of(resumed), state_of(first))
    assert all(trainer.step(BATCH) for trainer in (first, resumed)) and equal(state_of(resumed), state_of(first))


def test_torchs_own_reader_reads_the_files(saved):
    """The format is torch.distributed.checkpoint's safetensors shards, with transformers' names."""
    run_dir, _, at_2, _ = saved
    name = "model/layers.0.mlp.down_proj.weight"
    wanted = at_2["decoder.layers.0.mlp.linear_fc2.weight"]
    found = {name: torch.zeros_like(wanted)}
    load(found, storage_reader=HuggingFaceStorageReader(str(run_dir / "checkpoints/step-000002")), no_dist=True)
    assert torch.equal(found[name], wanted)


# -- saving --------------------------------------------------------------------------------------------------------


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(saved, tiny_student_dir, layout, tmp_path, monkeypatch):
    """Training goes on while the file is written; nothing is visible before the commit."""
    _, trainer, _, _ = saved
    before, go_on = state_of(trainer), checkpoint_module.threading.Event()
    write = checkpoint_module.write_pieces
    monkeypatch.setattr(checkpoint_module, "write_pieces", lambda *a: (go_on.wait(60), write(*a)))
    checkpoints = Checkpoints(tmp_path, layout, asynchronous=True)
    checkpoints.save(trainer, 3)
    trainer.step(BATCH)
    checkpoints.poll()
    assert checkpoints.latest_step() is None and not equal(state_of(trainer), before)
    go_on.set()
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    resumed = make_trainer(tiny_student_dir, layout, warmup_steps=3)
    checkpoints.load(resumed, 3)
    assert equal(state_of(resumed), before)


def test_a_failed_background_write_is_heard_at_the_next_step(copied, saved, monkeypatch, layout):
    root, _ = copied
    monkeypatch.setattr(checkpoint_module, "write_pieces", full_disk)
    checkpoints = Checkpoints(root.parent, layout, asynchronous=True)
    checkpoints.save(saved[1], 3)
    checkpoints._pending.join()
    with pytest.raises(ValueError, match=r"step 3 could not be saved: .*No space left.* needs \d+ bytes .* step 2"):
        checkpoints.poll()
    assert {path.name for path in root.iterdir()} == {"step-000001", "step-000002", "latest"}
    assert checkpoints.latest_step() == 2
    checkpoints.poll()  # once


def full_disk(*_arguments, **_options) -> None:
    raise OSError(28, "No space left on device")


def test_the_newest_are_kept_and_only_a_commit_removes(copied, saved, monkeypatch):
    root, checkpoints = copied
    shutil.copytree(root / "step-000002", root / "step-000009")  # of a continuation that was given up
    names = lambda: {path.name for path in root.iterdir()}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_atomically", full_disk)
        with pytest.raises(ValueError, match="No space left"):
            checkpoints.save(saved[1], 3)
    assert names() == {"step-000001", "step-000002", "step-000009", "latest"}
    checkpoints.save(saved[1], 3)
    assert names() == {"step-000002", "step-000003", "latest"}


def test_the_best_stays_beside_the_newest(copied, saved, monkeypatch):
    """It is another one once that is committed, and after `latest`: what goes first is neither of them."""
    root, checkpoints = copied
    trainer, names = saved[1], lambda: {path.name for path in root.iterdir()}
    checkpoints.set_best(1)
    for step in (3, 4):
        checkpoints.save(trainer, step)
    assert names() == {"step-000001", "step-000003", "step-000004", "latest", "best"} and checkpoints.best_step() == 1
    for fault in ("write_atomically", "write_pieces"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, fault, full_disk)
            with pytest.raises(ValueError, match="No space left"):
                checkpoints.save(trainer, 5, best=True)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, 1)
    with monkeypatch.context() as patch:
        point = Checkpoints._set_pointer
        patch.setattr(Checkpoints, "_set_pointer", lambda *a: full_disk() if a[1] == "best" else point(*a))
        with pytest.raises(ValueError, match="No space left"):
            checkpoints.save(trainer, 5, best=True)
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 1)
    checkpoints.save(trainer, 6, best=True)
    assert names() == {"step-000005", "step-000006", "latest", "best"} and checkpoints.best_step() == 6
    checkpoints.set_best(None)
    assert checkpoints.best_step() is None


def test_what_the_file_system_refuses_is_one_line(saved, layout, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the directory belongs")
    with pytest.raises(ValueError, match=rf"Not a directory: '{tmp_path}/checkpoints"):
        Checkpoints(tmp_path, layout).save(saved[1], 3)


def test_a_step_is_never_saved_over(copied, saved):
    root, checkpoints = copied
    before = (root / "step-000002" / "manifest.json").stat().st_mtime_ns
    checkpoints.save(saved[1], 2)
    assert (root / "step-000002" / "manifest.json").stat().st_mtime_ns == before


# -- damage --------------------------------------------------------------------------------------------------------

FILES = ("rank-00000.safetensors", "state.json", "manifest.json")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"\x80garbage\n"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(copied, saved, name, damage):
    root, checkpoints = copied
    DAMAGE[damage](root / "step-000002" / name)
    _, trainer, _, _ = saved
    before = state_of(trainer)
    with pytest.raises(ValueError) as error:
        checkpoints.load(trainer, checkpoints.latest_step())
    assert str(root / "step-000002") in str(error.value) and "\n" not in str(error.value)
    if not (name == "manifest.json" and damage == "flipped bit"):  # there a digest is wrong: its file is named
        assert name in str(error.value)
    assert equal(state_of(trainer), before), "nothing was loaded"
    verify(root / "step-000001")


@pytest.mark.parametrize("garbage", ["", "999999", "step-999999", "../../x", "step-000002/../..", "\x00\x01", "step-²"])
def test_a_garbage_pointer_is_refused(copied, garbage):
    root, checkpoints = copied
    for pointer, read in {"latest": checkpoints.latest_step, "best": checkpoints.best_step}.items():
        (root / pointer).write_text(garbage)
        with pytest.raises(
            ValueError, match=rf"{pointer} names .* which is no checkpoint here \(there are: step-000001, "
        ):
            read()


def test_a_renamed_or_foreign_checkpoint_is_refused(copied, saved, layout, tiny_teacher_dir):
    root, checkpoints = copied
    shutil.copytree(root / "step-000002", root / "step-000007")
    with pytest.raises(ValueError, match="step-000007 holds step 2: it was renamed"):
        checkpoints.load(saved[1], 7)
    with pytest.raises(ValueError, match=r"the checkpoint has no model/.*q_norm"):
        checkpoints.load(make_trainer(tiny_teacher_dir, layout), 2)
    manifest = root / "step-000002" / "manifest.json"
    digests = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps({"sha256": {**digests, "../step-000001/state.json": "0"}}))
    with pytest.raises(ValueError, match=r"manifest.json is missing or unreadable"):
        checkpoints.load(saved[1], 2)
