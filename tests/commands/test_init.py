"""`vold init` and `vold keys`: what a person needs in order to write a config."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from vold.commands.init import KEYS, SCHEMAS, write_config
from vold.commands.keys import print_keys
from vold.config import load_config
from vold.config.reference import COMMANDS

NO_PATHS = {"student": None, "teacher": None, "data": None}


@pytest.mark.parametrize("stage", sorted(KEYS))
def test_a_written_config_is_read_and_its_comments_are_the_defaults(tmp_path, stage):
    path = tmp_path / "c.yaml"
    write_config(stage, path, NO_PATHS)
    written = load_config(SCHEMAS[stage], path)
    uncommented = tmp_path / "uncommented.yaml"
    uncommented.write_text(re.sub(r"^( *)# ([a-z_]+:(?: \S.*)?)$", r"\1\2", path.read_text(), flags=re.M))
    assert uncommented.read_text() != path.read_text()
    assert load_config(SCHEMAS[stage], uncommented) == written
    assert max(map(len, path.read_text().splitlines()[3:])) <= 120


@pytest.mark.parametrize(
    ("row", "layout", "columns"),
    [
        ({"question": "1+1?", "answer": "2"}, "vqa", {}),
        ({"messages": [{"role": "user", "content": "1+1?"}]}, "messages", {}),
        ({"problem": "1+1?", "solution": "2"}, "vqa", {"question": "problem", "answer": "solution"}),
        ({"prompt": "1+1?", "reward_model": {"ground_truth": "2"}}, "vqa", {"answer": "reward_model.ground_truth"}),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, "alpaca", {}),
    ],
)
def test_the_layout_of_the_data_is_found(tmp_path, row, layout, columns):
    data, path = tmp_path / "mine.jsonl", tmp_path / "c.yaml"
    data.write_text(json.dumps(row) + "\n")
    write_config("rl", path, NO_PATHS | {"student": tmp_path / "s", "data": data})
    written = load_config(SCHEMAS["rl"], path)
    assert (written.data.path, written.data.layout, written.student) == (data, layout, tmp_path / "s")
    assert columns.items() <= dict(written.data.columns).items()


def test_data_of_an_unknown_shape_are_named(tmp_path, caplog, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"left": 1, "right": 2}\n')
    write_config("eval", tmp_path / "c.yaml", NO_PATHS | {"data": data})
    assert "the row has left, right" in caplog.text + capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["evaluation"]["sets"]["mine"]["path"] == str(data)


def test_nothing_is_written_over_and_paths_that_a_stage_does_not_use_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        write_config("rl", tmp_path / "c.yaml", NO_PATHS)
    with pytest.raises(ValueError, match="no student"):
        write_config("traces", tmp_path / "new.yaml", NO_PATHS | {"student": tmp_path})
    assert (tmp_path / "c.yaml").read_text() == "mine" and not (tmp_path / "new.yaml").exists()


def test_keys_lists_every_key_and_finds_by_name_or_meaning(capsys):
    print_keys("")
    out = capsys.readouterr().out
    for schema in COMMANDS:
        for name in schema.model_fields:
            assert re.search(rf"^(\w+\.)*{name}\b", out, re.M), name
    print_keys("optimizer.lr")
    assert "Peak learning rate" in capsys.readouterr().out
    print_keys("weight sync")
    assert "parity_limit" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no key has 'zebra'.*optimizer"):
        print_keys("zebra")
