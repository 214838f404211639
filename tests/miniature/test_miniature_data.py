"""Schema of every file, disjoint splits, answers and pictures that belong together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vold.miniature.data import PICTURE_FILES, TEXT_FILES, DataSizes, write_data, write_pictures
from vold.miniature.tokenizer import make_tokenizer
from vold.miniature.world import IMAGE_MARK, solve, split_of

COUNTS = {"train.json": 300, "traces_prompts.json": 100, "val_text.json": 40, "test_text.json": 50}


def expression_of(question: str) -> str:
    return re.sub("[<>]", "", re.search(r"\[(.*)\]", question)[1])


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("name", "split"), TEXT_FILES.items())
def test_text_files_have_the_orz_layout(world, name, split):
    rows = json.loads((world.data / name).read_text())
    assert len(rows) == COUNTS[name]
    tokenizer = make_tokenizer()
    for human, assistant in rows:
        assert (human["from"], assistant["from"]) == ("human", "assistant")
        expression = expression_of(human["value"])
        assert split_of(expression) == split
        assert assistant["ground_truth"]["value"] == solve(expression).answer
        assert tokenizer.unk_token_id not in tokenizer(human["value"]).input_ids


@pytest.mark.parametrize(("split", "count"), [("val", 40), ("test", 50)])
def test_image_files_have_the_geometry_layout(world, split, count):
    rows = read_jsonl(world.image(split))
    expressions = json.loads((world.data / "expressions.json").read_text())
    assert len(rows) == count
    for row in rows:
        assert set(row) == {"problem", "answer", "images"}
        assert row["problem"].count(IMAGE_MARK) == 1
        (name,) = row["images"]
        with Image.open(world.data / name) as picture:
            assert (picture.mode, picture.size) == ("RGB", (196, 28))
        assert split_of(expressions[name]) == split
        assert row["answer"] == solve(expressions[name]).answer
    pictures = {(world.data / name).read_bytes() for row in rows for name in row["images"]}
    assert len(pictures) == count


def test_traces_in_another_style(world):
    rows = read_jsonl(world.traces_other)
    assert len(rows) == 60
    for row in rows:
        assert set(row) == {"prompt", "response"}
        expression = expression_of(row["prompt"])
        assert split_of(expression) == "train"
        assert row["response"].endswith(f"</think>\\boxed{{{solve(expression).answer}}}")


def test_same_seed_same_files_and_sizes_do_not_disturb_each_other(world, tmp_path):
    write_data(tmp_path / "again", 3, DataSizes(train=10, traces_prompts=100, traces_other=60, val=40, test=50))
    write_data(tmp_path / "other", 4, DataSizes(train=10, traces_prompts=5, traces_other=5, val=5, test=5))
    for name in ("traces_prompts.json", "val_image.jsonl", "traces_other.jsonl", "images/val_0001.png"):
        assert (tmp_path / "again" / name).read_bytes() == (world.data / name).read_bytes()
    assert (tmp_path / "other" / "train.json").read_text() != (tmp_path / "again" / "train.json").read_text()


def test_an_existing_directory_is_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("kept")
    write_data(tmp_path / "data", 0, DataSizes(1, 1, 1, 1, 1))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_pixels_are_those_that_were_rendered(world):
    with Image.open(world.data / "images" / "val_0001.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    assert 40 < np.median(pixels) < 62  # the background, 255 * .2


def test_the_second_act_has_problems_in_pictures_of_their_own_splits(tmp_path):
    data = write_pictures(tmp_path / "pictures", 3, DataSizes(train=30, val=10, test=12))
    expressions = json.loads((data / "expressions.json").read_text())
    for name, split in PICTURE_FILES.items():
        rows = read_jsonl(data / name)
        assert len(rows) == {"train": 30, "val": 10, "test": 12}[split]
        for row in rows:
            (picture,) = row["images"]
            assert split_of(expressions[picture]) == split
            assert row["answer"] == solve(expressions[picture]).answer
            assert (data / picture).is_file()
