"""Hostile model text, YAML, checkpoints and image paths are refused in one line or graded; none of their code runs."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from vold.config import load_config
from vold.config.schema import DataConfig, ExportConfig
from vold.data.problems import load_problems
from vold.grading import Grader, equal
from vold.trainer.checkpoint import Checkpoints, shard_files, verify
from vold.trainer.shards import PieceReader

TEXTS = [
    "__import__('os').system('touch {mark}')",
    r"\sqrt{{2}}+__import__('os').system('touch {mark}')",
    "open('{mark}','w')",
    r"\sqrt{{4}}; import os; os.system('touch {mark}')",
    r"x^2 + exec(\text{{open('{mark}','w')}})",
    "().__class__.__base__.__subclasses__()",
    "Symbol('x').__class__.__init__.__globals__['sys'].modules['os'].system('touch {mark}')",
    "lambda: open('{mark}','w')",
    r"\input{{/etc/passwd}}",
    r"\write18{{touch {mark}}}",
    "$(touch {mark})",
    "`touch {mark}`",
    "{{{{ cycler.__init__.__globals__.os.popen('touch {mark}') }}}}",
    "%s%s%s%n {mark}",
]


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that exists once hostile code has run."""
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_never_evaluated(mark, grader, text):
    """As an answer, as a gold answer, and as both sides of a comparison that needs the parser."""
    text = text.format(mark=mark)
    rows = [(rf"\boxed{{{text}}}", r"2\sqrt{3}", False), (r"\boxed{\sqrt{12}}", text, False)]
    assert all(verdict.outcome in ("wrong", "broken") for verdict in grader.grade(rows))
    try:
        assert not equal(text + r"+\sqrt{2}", r"2\sqrt{3}")[0]
    except Exception as error:  # the parser may raise here, but not run the text
        assert not isinstance(error, SystemExit)
    assert not mark.exists()


@pytest.mark.parametrize(
    "tag", ["python/object/apply:pathlib.Path.touch", "python/object/new:pathlib.Path", "python/name:os.system"]
)
def test_yaml_makes_no_objects(mark, tmp_path, tag):
    path = tmp_path / "config.yaml"
    path.write_text(f"run: !!{tag} ['{mark}']\nout: x\n")
    with pytest.raises(ValueError, match="is not YAML") as error:
        load_config(ExportConfig, path)
    assert "\n" not in str(error.value)
    path.write_text("run: r\nout: x\n")
    with pytest.raises(ValueError, match="is not a YAML value"):
        load_config(ExportConfig, path, [f"step=!!{tag} ['{mark}']"])
    assert not mark.exists()


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def step(tmp_path, mark) -> Path:
    """A checkpoint directory whose files are pickles that run code when loaded."""
    step = tmp_path / "run" / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "rank-00000.safetensors", "state.json"):
        (step / name).write_bytes(pickle.dumps(Bomb(mark)))
    return step


def test_the_pickle_runs_code(step, mark):
    pickle.loads((step / ".metadata").read_bytes())
    assert mark.exists()


def test_a_pickle_of_a_checkpoint_is_refused_unread(step, mark, layout):
    (step.parent / "latest").write_text("step-000003\n")
    checkpoints = Checkpoints(step.parents[1], layout)
    for load in (checkpoints.load, checkpoints.load_weights):
        with pytest.raises(ValueError, match=r"manifest.json is missing or unreadable; this is not a checkpoint vold"):
            load(None, checkpoints.latest_step())
    assert not mark.exists()


def test_pickles_under_a_forged_manifest_are_refused_too(step, mark):
    names = ("rank-00000.safetensors", "state.json", ".metadata")
    digests = {name: hashlib.sha256((step / name).read_bytes()).hexdigest() for name in names}
    (step / "manifest.json").write_text(json.dumps({"sha256": digests}))
    verify(step)
    with pytest.raises(ValueError, match=r"rank-00000.safetensors cannot be read"):
        PieceReader(shard_files(step))
    with pytest.raises(ValueError):
        json.loads((step / "state.json").read_bytes())
    assert not mark.exists()


@pytest.fixture
def root(tmp_path) -> Path:
    """A data folder with images/in.png; out.png lies beside the folder, and links in it point there."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "in.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    (images / "link.png").symlink_to(tmp_path / "out.png")
    (images / "up").symlink_to(tmp_path)
    (images / "fine.png").symlink_to(images / "in.png")
    return tmp_path / "data"


def geometry(root: Path, name) -> DataConfig:
    path = root / "rows.jsonl"
    path.write_text(json.dumps({"problem": "<image>?", "answer": "4", "images": [name]}))
    return DataConfig(path=path, layout="geometry3k")


@pytest.mark.parametrize("name", ["images/in.png", "images/../images/in.png", "images/fine.png"])
def test_images_below_the_root_are_read(root, name):
    assert load_problems(geometry(root, name))[0].images == (root / "images" / "in.png",)


@pytest.mark.parametrize(
    "name",
    ["../out.png", "images/../../out.png", "{root}/../out.png", "/etc/passwd", "images/link.png", "images/up/out.png"],
)
def test_images_outside_the_root_are_refused(root, name):
    with pytest.raises(ValueError, match=r"rows.jsonl row 1: image .* lies outside"):
        load_problems(geometry(root, name.format(root=root)))


@pytest.mark.parametrize("name", ["", ".", "images", "file:///etc/passwd", "~/.ssh/id_rsa", "a\0b", 3, None, ["x"]])
def test_an_invalid_image_path_is_one_line(root, name):
    with pytest.raises(ValueError, match=r"rows.jsonl row 1: ") as error:
        load_problems(geometry(root, name))
    assert "\n" not in str(error.value)
