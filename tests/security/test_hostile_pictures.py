"""A page shows a run's own pictures and no others of the machine; no picture starts a program."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vold.data.pictures import check_picture
from vold.report import write_report
from vold.report.picture_files import PICTURE_BYTES, find_picture
from vold.report.read import read_run
from vold.report.samples import PER_SAMPLE, sample_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(config, records) -> a run among other folders: secret/s.png is no picture of its, data/d.png may be."""
    for name in ("secret/s.png", "data/images/d.png", "runs/run/own.png", "runs/images/beside.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), f"#{hashlib.sha256(name.encode()).hexdigest()[:6]}").save(tmp_path / name)
    run = tmp_path / "runs" / "run"
    (run / "link.png").symlink_to(tmp_path / "secret" / "s.png")
    (run / "folder").symlink_to(tmp_path / "secret")
    os.mkfifo(run / "fifo.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def build(config: dict | None = None, recorded: tuple[str, ...] = ()):
        (run / "config.yaml").write_text(yaml.safe_dump({"verb": "rl", **(config or {})}))
        rows = [
            {"name": f"pictures/{name}", "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
            for name in recorded
        ]
        (run / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"sha256": "-"}\n')
        return run

    return build


ELSEWHERE = [
    "{root}/secret/s.png",
    "../../secret/s.png",
    "link.png",
    "folder/s.png",
    "./folder/../folder/s.png",
    "{root}/data/images/d.png",
    "fifo.png",
    "/dev/zero",
    "/dev/stdin",
    "/etc/passwd",
    "x" * 5000,
    "a\0b",
    "",
    ".",
    "https://example.org/a.png",
]


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: name[:20])
def test_pictures_of_others_are_not_shown(place, tmp_path, name):
    run = place()
    row = {"step": 1, "prompt": "p", "response": "r", "images": [name.format(root=tmp_path)]}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (picture,) = sample_of(read_run(run), row).pictures
    assert picture.uri is None and picture.note and len(picture.note) < 400
    assert "data:image" not in write_report([run], tmp_path / "report.html", title="t").read_text()


def test_the_runs_own_are_shown(place, tmp_path):
    data = {"data": {"path": str(tmp_path / "data" / "train.jsonl")}}
    sets = {"evaluation": {"sets": {"text": {"path": "x", "image_root": str(tmp_path / "data" / "images")}}}}
    shown = [({}, "own.png"), ({}, "../images/beside.png"), (data, "{root}/data/images/d.png")]
    for config, name in [*shown, (sets, "{root}/data/images/d.png")]:
        assert find_picture(read_run(place(config)), name.format(root=tmp_path)).is_file()
    run = place({}, recorded=("secret/s.png",))
    moved = shutil.copytree(run, tmp_path / "elsewhere" / "run", symlinks=True, ignore=lambda *_: ["fifo.png"])
    assert find_picture(read_run(moved), str(tmp_path / "secret" / "s.png")), "byte for byte what the run recorded"


@pytest.mark.parametrize("root", ["/", "{root}", "{root}/home", "~", ".."])
def test_a_config_that_calls_everything_its_data_opens_nothing(place, tmp_path, root, monkeypatch):
    (tmp_path / "home").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "home" / "h.png")
    monkeypatch.chdir(tmp_path / "home")
    folder = root.format(root=tmp_path)
    run = read_run(place({"data": {"path": f"{folder}/x.jsonl", "image_root": folder}}))
    for name in ("home/h.png", "secret/s.png"):
        with pytest.raises(ValueError, match="is not shown"):
            find_picture(run, str(tmp_path / name))


@pytest.mark.parametrize("config", [[], 3, {"data": 3}, {"data": {"path": 3}}, {"evaluation": {"sets": {"a": [1]}}}])
def test_a_config_of_any_shape(place, config):
    run = place()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert find_picture(read_run(run), "own.png") == run / "own.png"


def test_sizes_and_numbers_are_bounded(place, tmp_path):
    run = place()
    with (run / "large.png").open("wb") as file:
        file.truncate(PICTURE_BYTES + 1)
    sample = sample_of(read_run(run), {"images": ["own.png"] * 100_000})
    assert len(sample.pictures) == PER_SAMPLE + 1 and sample.pictures[-1].note == f"and {100_000 - PER_SAMPLE} more"
    (large,) = sample_of(read_run(run), {"images": ["large.png"]}).pictures
    assert large.uri is None and "bytes" in large.note


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file's name."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path: Path = tmp_path / "cat.png"
    Image.new("RGB", (30, 20)).save(path, "EPS")
    with pytest.raises(ValueError, match=r"cat\.png cannot be decoded: cannot identify image file"):
        check_picture(path)
    assert not started.exists()
