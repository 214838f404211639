"""A resumed run names what has changed of its inputs, whichever file it is, and goes on where nothing has."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vold.train.input_files import RECORD, InputFiles, training_files
from vold.train.rl import train_rl
from vold.train.sft import train_sft


@pytest.fixture(scope="module")
def begun(world, load, tmp_path_factory, layout) -> Path:
    """A folder with copies of models and data, and in `run` an RL run of one step on images."""
    root = tmp_path_factory.mktemp("inputs")
    for name, source in (("student", world.student), ("teacher", world.teacher), ("data", world.data)):
        shutil.copytree(source, root / name)
    train_rl(rl_config(load, root))
    return root


def rl_config(load, root: Path):
    given = [f"student={root / 'student'}", f"teacher={root / 'teacher'}"]
    given += [f"data.path={root / 'data' / 'val_image.jsonl'}", "data.layout=geometry3k", "save_every=1"]
    text = f"{{text: {{path: {root / 'data' / 'val_text.json'}, layout: orz}}}}"
    given += [f"evaluation={{every: 9, sets: {text}, sampling: {{max_new_tokens: 1, temperature: 0.0}}}}"]
    return load("rl", root / "run", "steps=1", "prompts_per_step=2", "objective.preset=grpo", *given)


def refusal(load, root: Path) -> str:
    with pytest.raises(ValueError) as error:
        train_rl(rl_config(load, root), resume=True)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


CHANGED = [
    "student/model.safetensors",
    "student/config.json",
    "student/generation_config.json",
    "student/preprocessor_config.json",
    "teacher/model.safetensors",
    "teacher/tokenizer_config.json",
    "data/val_image.jsonl",
    "data/val_text.json",
    "data/images",
]


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_input_is_named(begun, load, name):
    path = begun / name if (begun / name).is_file() else min((begun / name).glob("val*.png"))
    before = path.read_bytes()
    changed = bytearray(before)
    if path.suffix in (".json", ".jsonl"):
        changed += b"\n"  # the same to every reader
    else:
        changed[-20] ^= 1
    path.write_bytes(changed)
    try:
        assert str(path) in refusal(load, begun)
    finally:
        path.write_bytes(before)


def test_new_and_missing_files_and_a_damaged_record_are_named(begun, load):
    template, record = begun / "student" / "chat_template.json", begun / "run" / RECORD
    template.write_text('{"chat_template": "other"}')
    assert f"{template} is new" in refusal(load, begun)
    template.unlink()
    gone = begun / "teacher" / "generation_config.json"
    gone.rename(begun / "gone")
    assert "teacher/generation_config.json is missing" in refusal(load, begun)
    (begun / "gone").rename(gone)
    before = record.read_bytes()
    record.write_bytes(before.replace(b'"bytes": ', b'"bytes": 1', 1))
    assert f"{record} is damaged" in refusal(load, begun)
    record.unlink()
    os.mkfifo(record)
    assert f"{record} is no ordinary file" in refusal(load, begun)
    record.unlink()
    record.write_bytes(before)


def test_times_and_places_are_not_compared(begun, load, tmp_path, caplog):
    moved = shutil.copytree(begun, tmp_path / "moved", copy_function=shutil.copyfile)
    train_rl(rl_config(load, moved), resume=True)
    (moved / "run" / RECORD).unlink()  # of an older vold
    with caplog.at_level("INFO", "vold"):
        train_rl(rl_config(load, moved), resume=True)
    assert any(RECORD in line and "not compared" in line for line in caplog.messages)


def test_sft_records_its_pictures_and_a_teacher_that_it_pairs_with(load, world, tmp_path, layout):
    config = load("sft", tmp_path / "sft", "steps=1", f"pair_with={world.teacher}")
    train_sft(config)
    names = [row["name"] for row in map(json.loads, (config.run_dir / RECORD).read_text().splitlines()[:-1])]
    assert {"pair_with/model.safetensors", f"data.path/{config.data.path.name}", "student/config.json"} <= {*names}
    assert len(names) == len({*names})


def test_an_input_that_cannot_be_read_leaves_no_record(tmp_path, layout, caplog):
    inputs = InputFiles(tmp_path, {"student/model.safetensors": tmp_path / "gone"})
    with caplog.at_level("WARNING", "vold"):
        inputs.record()
    assert "gone" in caplog.text and not (tmp_path / RECORD).exists()


def test_an_adapter_and_a_chat_template_are_inputs_too(load, world, tmp_path):
    (tmp_path / "chat.jinja").touch()
    given = [f"adapter={{path: {tmp_path / 'adapter'}}}", f"prompt.chat_template={tmp_path / 'chat.jinja'}"]
    files = training_files(load("sft", tmp_path / "sft", *given), [])
    assert files["adapter/adapter_model.safetensors"] == tmp_path / "adapter" / "adapter_model.safetensors"
    assert tmp_path / "chat.jinja" in files.values()
